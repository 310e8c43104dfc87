"""What can be chosen about the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from macrobatch.checks import check_integer
from macrobatch.errors import ArgumentError

__all__ = ["DemoOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """Settings shared by the three trainings, so that they differ in nothing but how a macro-batch is worked off.

    Args:
        epochs: passes over the 1,437 training images.
        macro_batch: samples per update. The training set should not be a multiple of it: the short window that is
            left at the end of each epoch is where the three ways part.
        micro_batch: samples per forward and backward, at most `macro_batch`.
        lr: peak of the one-cycle learning rate of AdamW.
        seed: draws the initial weights and the order of the samples.
        num_threads: CPU threads for PyTorch. Images of 8 × 8 pixels gain little from more than one, and with one the
            numbers do not depend on how many cores there are.
        out: folder for the results, made if it is not there.

    Raises:
        ArgumentError: an option is out of its domain.
    """

    epochs: int = 20
    macro_batch: int = 256
    micro_batch: int = 16
    lr: float = 5e-3
    seed: int = 0
    num_threads: int = 1
    out: Path = Path("runs/demo")

    def __post_init__(self) -> None:
        for name in ("epochs", "macro_batch", "micro_batch", "num_threads"):
            check_integer(name, getattr(self, name), fix=f"leave {name} at its default")
        if self.micro_batch > self.macro_batch:
            raise ArgumentError(
                "micro_batch",
                given=repr(self.micro_batch),
                expected=f"at most the macro_batch of {self.macro_batch}",
                fix="pass a smaller micro_batch",
            )
        if not 0 < self.lr < 1:
            raise ArgumentError("lr", given=repr(self.lr), expected="a number in (0, 1)", fix="leave it at 0.005")

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a full window; the constant N that the textbook loop divides by."""
        return -(-self.macro_batch // self.micro_batch)
