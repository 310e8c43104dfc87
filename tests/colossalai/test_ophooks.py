"""Hooks into a model's modules: when they are called, with what, and that they keep nothing alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from macrobatch.colossalai.engine import Engine
from macrobatch.colossalai.engine.ophooks import BaseOpHook


class Recording(BaseOpHook):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def pre_fwd_exec(self, module, *args):
        self.calls.append(("pre forward", (type(module).__name__, args[0][0].shape)))

    def post_fwd_exec(self, module, *args):
        self.calls.append(("post forward", (args[0][0].shape, args[1].shape)))

    def pre_bwd_exec(self, module, input, output):
        assert not output.requires_grad
        self.calls.append(("pre backward", (input[0].shape, output.shape)))

    def post_bwd_exec(self, module, input):
        self.calls.append(("post backward", input[0].shape))

    def post_iter(self):
        self.calls.append(("post iter", None))


class Other(Recording):
    """Another class of hook."""


def engine_of(*hooks: BaseOpHook) -> Engine:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), ophook_list=hooks)


def iterate(engine: Engine) -> None:
    engine.zero_grad()
    engine.backward(engine.criterion(engine(torch.ones(2, 4)), torch.zeros(2, 3)))
    engine.step()


def test_moments_come_in_order():
    hook = Recording()
    iterate(engine_of(hook))
    a, b, c = (2, 4), (2, 5), (2, 3)
    assert hook.calls == [
        ("pre forward", ("Linear", a)),
        ("post forward", (a, b)),
        ("pre forward", ("Linear", b)),
        ("post forward", (b, c)),
        ("pre backward", (b, c)),
        ("post backward", b),
        ("pre backward", (a, b)),  # no gradient is asked for of the data, so nothing follows
        ("post iter", None),
    ]


def test_hooks_come_and_go(capsys):
    engine, first, second = engine_of(), Recording(), Other()
    iterate(engine)
    engine.add_hook(first)
    engine.add_hook(second)
    assert engine.ophooks == [first, second]
    iterate(engine)
    engine.remove_hook(first)
    iterate(engine)
    engine.remove_hook(second)
    iterate(engine)
    assert (len(first.calls), len(second.calls)) == (8, 16)
    assert not engine.model[0]._forward_hooks
    assert "duplicate" not in capsys.readouterr().err
    engine.add_hook(first)
    engine.add_hook(Recording())
    assert "duplicate hooks, at least two instances of Recording" in capsys.readouterr().err


def test_a_hook_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="BaseOpHook"):
        engine_of(object())  # pyright: ignore[reportArgumentType]


def test_no_graph_outlives_its_iteration():
    engine = engine_of(Recording())
    output = engine(torch.ones(2, 4))
    engine.backward(output.sum())
    engine.step()
    graph = weakref.ref(output)
    gc.disable()  # it has to go without the garbage collector, which would not see a cycle through autograd
    try:
        del output
        assert graph() is None
    finally:
        gc.enable()
