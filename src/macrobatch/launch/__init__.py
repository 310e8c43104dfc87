"""Which rank this process is, the group of all ranks, and how to start them. Every socket is torch.distributed's."""

from macrobatch.launch.group import init, shutdown
from macrobatch.launch.ranks import Rendezvous, detect
from macrobatch.launch.spawn import spawn

__all__ = ["Rendezvous", "detect", "init", "shutdown", "spawn"]
