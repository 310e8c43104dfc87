"""Where a process stands among all: a value, not a global."""

from __future__ import annotations

from dataclasses import dataclass

from macrobatch.checks import is_integer
from macrobatch.errors import ArgumentError

__all__ = ["Ranks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """A process's numbers, as in torch.distributed.

    Attributes:
        rank: of this process, 0 <= rank < world_size.
        world_size: number of processes.
        local_rank: of this process on its machine.
        local_world_size: number of processes on its machine.

    ```pycon
    >>> Ranks(rank=3, world_size=8, local_rank=1, local_world_size=2).is_main
    False

    ```
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        for size, index in ((self.world_size, self.rank), (self.local_world_size, self.local_rank)):
            if not is_integer(index, 0) or not is_integer(size) or index >= size:
                raise ArgumentError(
                    "ranks",
                    given=self,
                    expected="integers, 0 <= rank < world_size, globally and locally",
                    fix="use torchrun",
                )

    @property
    def is_main(self) -> bool:
        """Rank 0 of all."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Rank 0 of its machine."""
        return self.local_rank == 0
