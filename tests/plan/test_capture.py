"""Captured micro-steps: the same gradient, or a fallback that says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import macrobatch as mb
import macrobatch.plan.capture
from macrobatch import tree
from macrobatch.plan.capture import compile_forward
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch.compile's own
    pytest.mark.xdist_group("compile"),  # in one worker, which alone imports and warms up the compiler
]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mb.Loss:
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    return mb.Loss(loss, len(batch[0]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(11, 5), torch.randint(0, 3, (11,))


def test_compiled_windows_are_exact(batch):
    model = network()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=4, capture="compile")
    reference = full_batch_gradient(model, loss_fn, batch)
    for _ in range(2):
        step(batch)
        assert relative_error(gradients_of(model), reference) <= 1e-6  # float32: tens of roundings of 6e-8


def test_what_cannot_be_compiled_runs_as_it_is(batch, caplog, monkeypatch):
    model = network()

    def unsupported(*_: object) -> None:
        raise torch._dynamo.exc.Unsupported("data-dependent control flow")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: unsupported)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=4, capture="compile")
    with caplog.at_level(logging.WARNING, logger="macrobatch"):
        step(batch)
    assert relative_error(gradients_of(model), full_batch_gradient(model, loss_fn, batch)) <= 1e-6
    assert [record.message for record in caplog.records] == [
        "capture: runs eagerly, since torch.compile failed: data-dependent control flow"
    ]


def test_errors_of_the_loss_function_stay_its_own(batch):
    model = network()

    def broken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise KeyError("mine")

    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), broken, micro_batch=4, capture="compile")
    with pytest.raises(KeyError, match="mine"):
        step(batch)


@pytest.mark.parametrize(("capture", "num_lines"), [("auto", 0), ("graph", 1)])
def test_graphs_on_a_host_run_eagerly(capture, num_lines, batch, caplog):
    model = network()
    with caplog.at_level(logging.INFO, logger="macrobatch"):
        step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=4, capture=capture)
        step(batch)
    assert relative_error(gradients_of(model), full_batch_gradient(model, loss_fn, batch)) <= 1e-6
    assert len(caplog.records) == num_lines


def test_forms_beyond_the_limit_of_recompilations_run_eagerly(batch, caplog, monkeypatch):
    monkeypatch.setattr(macrobatch.plan.capture, "_MAX_FORMS", 1)
    model = network()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=1, capture="compile")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            step.window(tree.split(batch, [4, 4, 2, 1]))
            assert relative_error(gradients_of(model), full_batch_gradient(model, loss_fn, batch)) <= 1e-6
    assert [record.getMessage() for record in caplog.records] == [
        "capture: runs eagerly, since there are more than 1 forms of micro-batch; further ones"
    ]


def test_a_compiled_forward_stays_compiled_with_wider_gradients(batch):
    """torch.compile gives up without a word on parameters whose gradient has another dtype."""
    model = network().bfloat16()
    num_runs = 0

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal num_runs
            num_runs += 1
            return graph.forward(*args)

        return run

    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=4)
    inputs = batch[0].bfloat16(), batch[1]
    step(inputs)
    expected = gradients_of(model)
    compile_forward(model, {"backend": backend})
    step(inputs)
    assert num_runs == 3
    step(inputs)
    assert num_runs == 6
    assert relative_error(gradients_of(model), expected) <= 1e-6  # the same operations, summed in float32


@pytest.mark.parametrize("capture", ["compile", "graph", "auto"])
def test_two_passes_are_not_captured(capture):
    model = network()
    two_pass = mb.TwoPass(lambda model, x: model(x), lambda representations: representations.square().mean())
    with pytest.raises(mb.errors.ArgumentError, match="TwoPass"):
        mb.TrainStep(model, SGD(model.parameters(), lr=0.0), two_pass, micro_batch=4, capture=capture)


@pytest.mark.parametrize("capture", ["graphs", True, 1], ids=str)
def test_unknown_captures_are_refused(capture):
    model = network()
    with pytest.raises(mb.errors.ArgumentError, match="capture"):
        mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=4, capture=capture)
