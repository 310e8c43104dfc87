"""The training loop, and what is called around it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from macrobatch.checks import check_integer
from macrobatch.colossalai.engine.gradient_accumulation import GradAccumDataloader
from macrobatch.colossalai.trainer.hooks.base_hook import BaseHook
from macrobatch.colossalai.utils.common import is_dp_rank_0
from macrobatch.colossalai.utils.cuda import get_current_device
from macrobatch.errors import ArgumentError, BatchError
from macrobatch.tree import to_device

__all__ = ["Trainer"]

_END = object()


class Trainer:
    """Runs an engine over data.

    Args:
        engine: what is trained.
        timer: a `MultiTimer`, for hooks that report times.
        logger: says so where `max_steps` end a training.

    Attributes:
        cur_epoch: epochs so far; set it to go on with a later one.
        cur_step: micro-iterations so far, those of the epochs before a `cur_epoch` that was set among them.
            `engine.num_updates` counts updates.
        states: what hooks keep, metrics among it.
    """

    def __init__(self, engine: Any, timer: Any = None, logger: Any = None) -> None:
        if not callable(getattr(engine, "execute_schedule", None)):
            raise ArgumentError(
                "engine", given=type(engine).__name__, expected="an Engine", fix="pass the one that initialize returned"
            )
        self._engine = engine
        self.timer = timer
        self._logger = logger
        self.states: dict[str, Any] = {}
        self.hooks: list[BaseHook] = []
        self.cur_epoch = 0
        self.cur_step = 0
        self.max_epochs = 0
        self.max_steps: int | None = None
        self.steps_per_epoch = 0

    @property
    def engine(self) -> Any:
        """What is trained."""
        return self._engine

    def fit(
        self,
        train_dataloader: Iterable[Any],
        epochs: int,
        max_steps: int | None = None,
        test_dataloader: Iterable[Any] | None = None,
        test_interval: int = 1,
        hooks: Sequence[BaseHook] | None = None,
        display_progress: bool = False,
        return_output_label: bool = True,
    ) -> None:
        """Train until `epochs` are reached, or `max_steps`.

        Args:
            train_dataloader: any loader. Each epoch begins a new window, and its last batch ends one.
            epochs: of all calls together: training begins with `cur_epoch`.
            max_steps: micro-iterations of all calls together. The last of them ends its window.
            test_dataloader: evaluated after every `test_interval` epochs.
            hooks: called from low to high priority.
            return_output_label: False saves their memory; hooks then get None.

        Raises:
            ArgumentError: an argument is out of its domain.
            BatchError: an epoch has no batch.
        """
        check_integer("epochs", epochs, at_least=0, fix="pass 1")
        check_integer("test_interval", test_interval, fix="pass 1")
        check_integer("max_steps", max_steps, or_none=True, fix="leave it out")
        self.max_epochs, self.max_steps = epochs, max_steps
        self._attach(hooks)
        loader = train_dataloader
        if not isinstance(loader, GradAccumDataloader):
            optimizer = self._engine.optimizer
            loader = GradAccumDataloader(loader, optimizer.accumulate_size, optimizer)
        self.steps_per_epoch = _length(loader)
        if self.cur_step == 0:
            self.cur_step = self.cur_epoch * self.steps_per_epoch
        self._call("before_train")
        while self.cur_epoch < epochs and not self._is_over():
            self._train_epoch(loader, display_progress, return_output_label)
            if test_dataloader is not None and self.cur_epoch % test_interval == 0:
                self._test(test_dataloader, display_progress, return_output_label)
        if self._is_over() and self._logger is not None:
            self._logger.info(f"max_steps: stopped after micro-iteration {self.cur_step}", ranks=[0])
        self._call("after_train")
        if self.timer is not None:
            self.timer.reset()

    def evaluate(
        self,
        test_dataloader: Iterable[Any],
        hooks: Sequence[BaseHook] | None = None,
        display_progress: bool = False,
        return_output_label: bool = True,
    ) -> None:
        """Test; what hooks have measured is in `states`."""
        self._attach(hooks)
        self._test(test_dataloader, display_progress, return_output_label)

    def predict(self, data: Any) -> Any:
        """The model's output for a batch, in evaluation mode."""
        was_training = self._engine.training
        self._engine.eval()
        try:
            with torch.no_grad():
                batch: Any = to_device(data, get_current_device())
                return self._engine(*batch) if isinstance(batch, list | tuple) else self._engine(batch)
        finally:
            if was_training:
                self._engine.train()

    def _is_over(self) -> bool:
        return self.max_steps is not None and self.cur_step >= self.max_steps

    def _train_epoch(self, loader: Iterable[Any], display_progress: bool, return_output_label: bool) -> None:
        self._engine.train()
        self._engine.optimizer.discard()  # a resumed window too: the epoch begins with its first batch
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.cur_epoch)  # of a resumed run: the order that it would have had
        data_iter: Any = iter(loader)
        self._call("before_train_epoch")
        name, before = f"[Epoch {self.cur_epoch + 1} / Train]", self.cur_step
        with self._timed("Train-epoch"), _bar(name, self.steps_per_epoch, display_progress) as bar:
            while not self._is_over() and (batch := self._next(data_iter, "Train-step")) is not _END:
                self._call("before_train_iter")
                outcome = self._train_iter(batch, return_output_label)
                self._stop("Train-step")
                self._call("after_train_iter", *outcome)
                self.cur_step += 1
                bar.set_postfix(self.states.get("step_metrics", {}), refresh=False)
                bar.update()
        data_iter.close()
        if self.cur_step == before and not self._is_over():
            raise BatchError(
                "train_dataloader",
                given=f"no batch in epoch {self.cur_epoch + 1}",
                expected="at least one in every epoch",
                fix="lower batch_size or leave drop_last out; an iterator has to become a list, to be read again",
            )
        self.cur_epoch += 1
        self._call("after_train_epoch")

    def _train_iter(self, batch: Any, return_output_label: bool) -> tuple[Any, Any, Tensor | None]:
        engine = self._engine
        if self.cur_step + 1 == self.max_steps:
            engine.optimizer.is_end_of_data = True
        engine.zero_grad()
        outcome = engine.execute_schedule(
            iter((batch,)), forward_only=False, return_loss=True, return_output_label=return_output_label
        )
        engine.step()
        return outcome

    def _test(self, loader: Iterable[Any], display_progress: bool, return_output_label: bool) -> None:
        engine = self._engine
        was_training = engine.training
        engine.eval()
        self._call("before_test")
        self._call("before_test_epoch")
        data_iter = iter(loader)
        name = f"[Epoch {self.cur_epoch} / Test]"
        with self._timed("Test-epoch"), torch.no_grad(), _bar(name, _length(loader), display_progress) as bar:
            while (batch := self._next(data_iter, "Test-step")) is not _END:
                self._call("before_test_iter")
                outcome = engine.execute_schedule(
                    iter((batch,)), forward_only=True, return_loss=True, return_output_label=return_output_label
                )
                self._stop("Test-step")
                self._call("after_test_iter", *outcome)
                bar.set_postfix(self.states.get("step_metrics", {}), refresh=False)
                bar.update()
        self._call("after_test_epoch")
        self._call("after_test")
        if was_training:
            engine.train()

    def _attach(self, hooks: Sequence[BaseHook] | None) -> None:
        given: object = [] if hooks is None else hooks
        if not isinstance(given, list) or not all(isinstance(hook, BaseHook) for hook in given):
            raise ArgumentError("hooks", given=given, expected="a list of BaseHook", fix="pass [LossHook(), ...]")
        self.states = {}
        self.hooks = sorted(given, key=lambda hook: hook.priority)
        for hook in self.hooks:
            hook.after_hook_is_attached(self)

    def _call(self, moment: str, *args: Any) -> None:
        for hook in self.hooks:
            getattr(hook, moment)(self, *args)

    def _next(self, data_iter: Iterator[Any], name: str) -> Any:
        """The next batch, with whose loading a step's time begins; `_END` after the last."""
        if self.timer is not None:
            self.timer.start(name)
        return next(data_iter, _END)

    def _stop(self, name: str) -> None:
        if self.timer is not None:
            self.timer.stop(name, keep_in_history=True)

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        if self.timer is not None:
            self.timer.start(name)
        try:
            yield
        finally:
            if self.timer is not None:
                self.timer.stop(name)


def _length(loader: Iterable[Any]) -> int:
    """Number of batches; 0 if the loader does not know."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return 0


def _bar(name: str, total: int, display_progress: bool) -> Any:
    return tqdm(total=total or None, desc=name, disable=not (display_progress and is_dp_rank_0()), leave=False)
