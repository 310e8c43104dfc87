"""Who takes part in a save: all ranks, or the main process alone, as in scripts that save `if is_main_process`."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

__all__ = ["Attendance", "Present"]

_LOG = logging.getLogger("macrobatch")
_EVER = timedelta(days=30)

Present = Literal["all", "main", "late"]
"""All ranks take part; or only the main process, of which it hears "main", and who comes nevertheless, "late"."""


class Attendance:
    """Finds out who calls, in the key-value store of the process group: a collective would hang if some do not.

    The main process decides, once for each of its calls, when the others are there or its patience has come to an end;
    whoever comes waits for that.

    Args:
        patience_s: how long the main process waits for the others. Once it has been alone, it expects to be so again.
    """

    def __init__(self, patience_s: float = 10.0) -> None:
        self.patience_s = patience_s

    def meet(self, what: str, *, rank: int, world_size: int) -> Present:
        """Who is there.

        Args:
            what: is to be saved, the same on all ranks.
        """
        if world_size == 1:
            return "all"
        group: Store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        store = PrefixStore("macrobatch/attendance", group)
        if rank == 0:
            return self._decide(store, what, world_size)
        while True:
            number = store.add(f"calls/{rank}", 1)
            store.set(f"{number}/{rank}", what)
            store.wait([f"{number}"], _EVER)
            decision, _, saved = store.get(f"{number}").decode().partition(" ")
            if decision == "all":
                return "all"
            if saved == what:
                _LOG.warning("Rank %d came late to save_state: its random state is not in %s.", rank, what)
                return "late"
            _LOG.warning(
                "Rank %d waits to save to %s; the main process has saved to %s. All ranks have to name one folder.",
                rank,
                what,
                saved,
            )

    def _decide(self, store: Store, what: str, world_size: int) -> Present:
        number = store.add("calls/0", 1)
        others = [f"{number}/{rank}" for rank in range(1, world_size)]
        end = time.monotonic() + self.patience_s
        while not store.check(others) and time.monotonic() < end:
            time.sleep(0.005)
        # Who is ahead, at a later save, has not come to this one.
        are_here = store.check(others) and all(store.get(other).decode() == what for other in others)
        store.set(f"{number}", "all" if are_here else f"main {what}")
        if are_here:
            return "all"
        if self.patience_s > 1:
            _LOG.warning(
                "Only the main process called save_state: within %g s, the other ranks did not. Their random states "
                "are not in %s. Call save_state on all ranks, outside of any `if is_main_process`, so that training "
                "resumes to the same bits.",
                self.patience_s,
                what,
            )
        self.patience_s = min(self.patience_s, 1.0)
        return "main"
