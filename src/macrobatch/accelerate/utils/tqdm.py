"""A progress bar on the main process."""

from __future__ import annotations

from typing import Any

__all__ = ["tqdm"]


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """`tqdm.auto.tqdm`, silent on all ranks of a machine but the first.

    Args:
        main_process_only: False shows one on every rank.
    """
    if args and isinstance(args[0], bool):
        raise TypeError(
            "tqdm: given a flag as its first argument; expected the iterable. To fix it, pass main_process_only=."
        )
    from tqdm import auto  # in a notebook it may warn about widgets: when a bar is wanted, not before

    from macrobatch.accelerate.state import PartialState  # built on the other modules of this package

    if main_process_only and not kwargs.get("disable", False):
        kwargs["disable"] = PartialState().local_process_index != 0
    return auto.tqdm(*args, **kwargs)
