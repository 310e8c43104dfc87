"""Loggers that say each thing once, on the ranks that are asked to."""

from macrobatch.colossalai.logging.logger import DistributedLogger, disable_existing_loggers, get_dist_logger

__all__ = ["DistributedLogger", "disable_existing_loggers", "get_dist_logger"]
