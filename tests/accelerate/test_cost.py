"""What a micro-step costs besides its forward and backward, by counting: nothing is asked of the file system, of the
environment or of the import system, and few functions are called. The original is the control."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerate.doors import BOTH, ORIGINAL, OURS, entered

NUM_STEPS = 4
NUM_BATCHES = 16


def epoch(door: Any) -> Callable[[], None]:
    """An epoch of the guide's loop."""
    accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=NUM_STEPS)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    loader = DataLoader(TensorDataset(torch.randn(2 * NUM_BATCHES, 4)), batch_size=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def run() -> None:
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    return run


def by_hand() -> Callable[[], None]:
    """The same, as the guide writes it without a library."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    loader = DataLoader(TensorDataset(torch.randn(2 * NUM_BATCHES, 4)), batch_size=2)

    def run() -> None:
        for index, (x,) in enumerate(loader, start=1):
            (model(x).mean() / NUM_STEPS).backward()
            if index % NUM_STEPS == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    return run


@contextmanager
def probes_counted(monkeypatch: pytest.MonkeyPatch) -> Generator[Counter[str]]:
    """Counts what is asked of the environment, of the import system and of the file system."""
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            seen[what] += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, count)

    with monkeypatch.context() as patch:
        counted(type(os.environ), "__getitem__", "environment")
        counted(importlib.util, "find_spec", "find_spec")
        for finder in (sys.path_importer_cache[path] for path in sys.path if sys.path_importer_cache.get(path)):
            counted(type(finder), "find_spec", "file system")
            break
        for name in ("stat", "listdir", "scandir", "open"):
            counted(os, name, "file system")
        yield seen


def calls(run: Callable[[], None]) -> int:
    """How many Python functions are called."""
    count = 0

    def profile(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("package", BOTH)
def test_nothing_is_probed_in_a_step(package: str, monkeypatch: pytest.MonkeyPatch):
    with entered(package) as door:
        run = epoch(door)
        run()
        with probes_counted(monkeypatch) as seen:
            run()
    if package == OURS:
        assert seen == {}
    else:
        assert seen["find_spec"] == 2 * NUM_BATCHES  # at every step, for an optimizer that nobody has
        assert seen["environment"] > NUM_BATCHES


def test_events_that_python_audits_do_not_occur_in_a_step():
    seen: list[str] = []
    is_on = False

    def audit(event: str, _: Any) -> None:
        if is_on and event.startswith(("open", "import", "os.", "socket.", "subprocess.")):
            seen.append(event)

    sys.addaudithook(audit)  # for as long as the process lives; it does nothing while it is off
    with entered(OURS) as door:
        run = epoch(door)
        run()
        is_on = True
        run()
        is_on = False
    assert seen == []
    is_on = True
    os.listdir(".")
    is_on = False
    assert seen  # the hook hears


def test_fewer_functions_are_called_than_in_the_original():
    counts: dict[str, int] = {}
    for package in BOTH:
        with entered(package) as door:
            run = epoch(door)
            run()
            counts[package] = calls(run)
    hand = by_hand()
    hand()
    extra = {package: (count - calls(hand)) / NUM_BATCHES for package, count in counts.items()}
    assert extra[OURS] < extra[ORIGINAL] / 3
    assert extra[OURS] < 110
