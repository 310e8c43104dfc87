"""Losses of models that are not prepared, given to the accelerator's backward: whatever the window does, they get a
share of 1/N, as in the original, which is the control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.accelerate.doors import BOTH, OURS, entered, of_both

pytestmark = pytest.mark.xdist_group("ranks")

NUM_STEPS = 3


class Own(torch.autograd.Function):
    """A function as scripts write them: the graph goes on behind it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = 2.0
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return ctx.factor * grad_outputs[0]


def forward_of(kind: str, model: nn.Module, x: Tensor) -> Tensor:
    if kind == "plain":
        return model(x)
    if kind == "function":
        return Own.apply(model(x))  # pyright: ignore[reportReturnType]
    x = x.clone().requires_grad_()
    return checkpoint(model if kind == "checkpoint" else lambda x: model(x), x, use_reentrant=True)


def beside(package: str, kind: str, where: str, is_weighted: bool) -> tuple[list[float], float]:
    """The gradient of a model that is not prepared after each micro-batch of a window with a short end, and that of
    the prepared one at the window's end; only our windows have weights."""
    with entered(package) as door:
        accelerator = door.Accelerator(gradient_accumulation_steps=NUM_STEPS, cpu=True)
        rank, num_ranks = accelerator.process_index, accelerator.num_processes
        module, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        weight = module.weight
        rows = torch.arange(1.0, 1.0 + NUM_STEPS * 2 * num_ranks - 1).view(-1, 1)
        model, optimizer, loader = accelerator.prepare(
            module, torch.optim.SGD(module.parameters(), lr=0.1), DataLoader(rows, batch_size=2)
        )
        gradients: list[float] = []
        final = 0.0
        for turn, x in enumerate(loader, start=1):

            def add(turn: int = turn) -> None:
                of_rank = torch.full((2, 1), turn + 10.0 * rank)
                accelerator.backward(forward_of(kind, other, of_rank).mean())

            if where == "before":
                add()
            with accelerator.accumulate(model):
                if where == "inside":
                    add()
                if is_weighted and package == OURS:
                    accelerator.backward(model(x).sum(), weight=len(x))
                else:
                    accelerator.backward(model(x).mean())
                if where == "inside, last":
                    add()
                if accelerator.sync_gradients:
                    final = clipped(accelerator, weight)
                optimizer.step()
                optimizer.zero_grad()
            if where == "after":
                add()
            gradients.append(other.weight.grad.item())
        return gradients, final


def clipped(accelerator: Any, weight: Tensor) -> float:
    """The finished gradient."""
    accelerator.unscale_gradients()
    assert weight.grad is not None
    return weight.grad.item()


@pytest.mark.parametrize("is_weighted", [False, True], ids=["means", "weights"])
@pytest.mark.parametrize("where", ["before", "inside", "inside, last", "after"])
@pytest.mark.parametrize("kind", ["plain", "function", "checkpoint", "checkpoint of a closure"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_its_share_is_the_originals(ranks: Any, num_ranks: int, kind: str, where: str, is_weighted: bool):
    theirs, ours = of_both(ranks, num_ranks, beside, kind, where, is_weighted)
    assert len(ours) == num_ranks
    for rank, ((original, _), (gradients, final)) in enumerate(zip(theirs, ours, strict=True)):
        factor = 2.0 if kind == "function" else 1.0
        sums = [factor * sum(t + 10.0 * rank for t in range(1, turn + 1)) for turn in range(1, NUM_STEPS + 1)]
        assert gradients == original  # bit by bit
        assert gradients == pytest.approx([each / NUM_STEPS for each in sums], rel=1e-6)  # float32, few roundings
        if num_ranks == 1:  # its window is exact all the same: the mean of 1 to 5
            assert final == pytest.approx(3.0, rel=1e-6)


def beside_a_wrapped_one(package: str, options: dict[str, bool], is_weighted: bool) -> tuple[float, float]:
    """The gradients of the prepared model, in DDP, and of the other."""
    with entered(package) as door:
        handler = door.DistributedDataParallelKwargs(**options)
        accelerator = door.Accelerator(gradient_accumulation_steps=NUM_STEPS, cpu=True, kwargs_handlers=[handler])
        module, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
        final = 0.0
        for turn in range(1, NUM_STEPS + 1):
            x = torch.full((2, 1), turn + 10.0 * accelerator.process_index)
            with accelerator.accumulate(model):
                accelerator.backward(other(x).mean())
                if is_weighted and package == OURS:
                    accelerator.backward(model(x).sum(), weight=2)
                else:
                    accelerator.backward(model(x).mean())
                if accelerator.sync_gradients:
                    final = clipped(accelerator, module.weight)
                optimizer.step()
                optimizer.zero_grad()
        return final, other.weight.grad.item()


@pytest.mark.parametrize("is_weighted", [False, True], ids=["means", "weights"])
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_its_share_is_the_originals_beside_a_wrapped_one(ranks: Any, options: dict[str, bool], is_weighted: bool):
    packages = [OURS] if "static_graph" in options else BOTH  # the original's static graphs fail in no_sync
    for package in packages:
        gradients = ranks(2).run(beside_a_wrapped_one, package, options, is_weighted)
        assert [other for _, other in gradients] == pytest.approx([2.0, 12.0], rel=1e-6)
        assert [final for final, _ in gradients] == pytest.approx([7.0, 7.0], rel=1e-6)  # over both ranks


@pytest.mark.parametrize("weight", [0, torch.tensor(0)])
def test_a_loss_over_nothing_leaves_its_gradient_finite(weight: Any):
    with entered(OURS) as door:
        accelerator = door.Accelerator(gradient_accumulation_steps=2, cpu=True)
        module, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        model, _ = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum(), weight=1)
            accelerator.backward(0.0 * other(torch.ones(1, 1)).sum(), weight=weight)
        assert other.weight.grad is not None
        assert other.weight.grad.item() == 0.0
