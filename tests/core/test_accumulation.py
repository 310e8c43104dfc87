"""A window driven from outside: the same exactness as one that the core runs by itself, in any order of calls."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

import macrobatch as mb
from macrobatch.core.accumulation import Accumulation
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.handover import share_of
from macrobatch.core.precision import Precision
from macrobatch.core.weighting import Constant, Exact
from macrobatch.core.window import Window
from macrobatch.sync import make_sync
from macrobatch.testing.models import CASES
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error
from macrobatch.tree import num_rows, select

pytestmark = pytest.mark.xdist_group("ranks")

EXACT = 1e-12  # float64: a few hundred roundings of 1e-16
SPLITS = {"whole": [12], "ragged": [5, 1, 4, 2], "single": [1] * 12}


def accumulation(model: nn.Module, size: int, policy: Any = Exact) -> Accumulation:
    sync = make_sync("auto", model)
    gradients = GradientBuffer(model.parameters, header=sync.header, widens=sync.widens)
    return Accumulation(
        model,
        gradients,
        optimizers=list,
        window=Window(size),
        policy=policy,
        precision=Precision(),
        sync=sync,
    )


def cut(batch: Any, sizes: list[int]) -> list[Any]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [select(batch, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def run(acc: Accumulation, case: Any, micro_batches: list[Any]) -> None:
    for index, micro_batch in enumerate(micro_batches, start=1):
        with acc.micro_batch(end_of_data=index == len(micro_batches)):
            loss = case.loss_fn(acc._model, micro_batch)
            if isinstance(loss, Tensor):
                acc.backward(loss, num_samples=num_rows(micro_batch))
            else:
                acc.backward(loss.total, weight=loss.weight)


def given_back(model: nn.Module, acc: Accumulation) -> dict[str, Tensor | None]:
    used = {id(param) for param, _ in acc.gradients.used()}
    found = gradients_of(model)
    return {
        name: found[name] if id(param) in used else None for name, param in model.named_parameters() if name in found
    }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", CASES)
def test_window_equals_full_batch(kind, split):
    torch.manual_seed(3)
    case = CASES[kind](12)
    case.model.double()
    batch = mb.tree.map_tensors(lambda t: t.double() if t.is_floating_point() else t, case.batch)
    acc = accumulation(case.model, size=len(SPLITS[split]) + 1)  # never full: closed by the end of the data
    run(acc, case, cut(batch, SPLITS[split]))
    assert relative_error(given_back(case.model, acc), full_batch_gradient(case.model, case.loss_fn, batch)) <= EXACT


def test_constant_divides_short_window_by_its_full_size():
    # The control: what `loss / N` does to a short window is not the full batch's gradient.
    model = nn.Linear(1, 1, bias=False).double()
    acc = accumulation(model, 4, policy=lambda: Constant(4))
    for value in (1.0, 3.0):
        with acc.micro_batch(end_of_data=value == 3.0):
            acc.backward(model(torch.tensor([[value]], dtype=torch.float64)).mean())
    assert model.weight.grad.item() == (1.0 + 3.0) / 4


def test_several_backwards_of_a_micro_batch_count_its_samples_once():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    acc = accumulation(model, 2)
    for part in (x[:4], x[4:]):
        with acc.micro_batch():
            first, second = model(part).square().mean(), model(part).abs().mean()
            acc.backward(first, num_samples=len(part))
            acc.backward(second, num_samples=len(part))
    found = gradients_of(model)
    model.zero_grad()
    (model(x).square().mean() + model(x).abs().mean()).backward()
    assert relative_error(found, gradients_of(model)) <= EXACT


def test_backward_outside_of_a_micro_batch_is_a_window_of_its_own():
    model = nn.Linear(1, 1, bias=False)
    acc = accumulation(model, 4)
    one = torch.ones(1, 1)
    acc.backward(model(one).mean() / 2)  # a loop that accumulates by hand
    acc.backward(model(3 * one).mean() / 2)
    assert acc.is_last
    acc.finish()
    assert model.weight.grad.item() == 2.0
    acc.settle()
    assert (acc.window.num_skipped, acc.window.num_pending) == (1, 0)  # nobody stepped


def test_step_is_counted_and_the_next_window_begins_clean():
    model = nn.Linear(1, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=0.0)
    acc = accumulation(model, 1)
    for value in (2.0, 5.0):
        with acc.micro_batch():
            acc.backward(model(torch.full((1, 1), value)).mean())
            with acc.lent_to([optimizer]) as has_update:
                assert has_update
                assert model.weight.grad.item() == value
                optimizer.step()
    acc.settle()
    assert acc.window.num_updates == 2


def test_window_that_nobody_steps_is_skipped_and_leaves_nothing():
    model = nn.Linear(1, 1, bias=False)
    acc = accumulation(model, 2)
    gradients = []
    for index in range(6):
        with acc.micro_batch():
            if index == 3:
                continue  # a NaN, say, on the last micro-batch of the second window
            acc.backward(model(torch.full((1, 1), -float(index + 1))).mean())
        if acc.is_final:
            gradients.append(model.weight.grad.item())
    assert gradients == [-1.5, -5.5]
    acc.settle()
    assert acc.window.num_skipped == 3


def test_error_inside_gives_up_what_this_rank_has_and_keeps_the_place():
    model = nn.Linear(1, 1, bias=False)
    acc = accumulation(model, 3)
    for value in (1.0, 100.0, 5.0):
        with suppress(ValueError), acc.micro_batch():
            acc.backward(model(torch.full((1, 1), value)).mean())
            if value == 100.0:
                raise ValueError("a bad sample")
    assert acc.window.num_pending == 3
    assert model.weight.grad.item() == 5.0


@pytest.mark.parametrize("call", ["backward", "nested", "mixed", "early", "uncounted", "save"])
def test_misuse_is_refused(call):
    model = nn.Linear(1, 1, bias=False)
    acc = accumulation(model, 2)
    loss = model(torch.ones(1, 1)).mean()
    if call == "backward":  # after the gradient was taken
        acc.enter(end_of_data=True)
        acc.backward(loss)
        acc.clip_norm(1.0)
        with pytest.raises(mb.errors.WindowError, match="already"):
            acc.backward(model(torch.ones(1, 1)).mean())
    elif call == "nested":
        acc.enter()
        with pytest.raises(mb.errors.WindowError, match="within another"):
            acc.enter()
    elif call == "mixed":
        acc.enter()
        acc.backward(loss, weight=3)
        with pytest.raises(mb.errors.LossError, match="with a weight"):
            acc.backward(model(torch.ones(1, 1)).mean())
    elif call == "early":
        acc.enter()
        acc.backward(loss)
        with pytest.raises(mb.errors.WindowError, match="not the last"):
            acc.finish()
    elif call == "uncounted":
        acc.enter(end_of_data=True)
        loss.backward()
        with pytest.raises(mb.errors.LossError, match="nobody counted"):
            acc.leave()
    else:
        acc.enter()
        with pytest.raises(mb.errors.WindowError, match="within a micro-batch"):
            acc.state_dict()


def resumed_gradient(stop: int | None) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(10, 3)
    acc = accumulation(model, 4)
    parts = cut(x, [3, 2, 4, 1])
    for index, part in enumerate(parts):
        if index == stop:
            state = copy.deepcopy(acc.state_dict())
            acc.gradients.release()
            acc = accumulation(model, 4)
            acc.load_state_dict(state)
        with acc.micro_batch():
            acc.backward(model(part).square().mean(), num_samples=len(part))
    return gradients_of(model), acc.window.state_dict()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_in_a_window_gives_the_same_bits(stop):
    straight, resumed = resumed_gradient(None), resumed_gradient(stop)
    assert straight[1] == resumed[1]
    assert all(torch.equal(a, b) for a, b in zip(straight[0].values(), resumed[0].values(), strict=True))


def test_rank_that_has_given_up_its_part_goes_on_with_nothing():
    """And not as one that has not begun: the others would wait for it to plan."""
    states: list[Any] = []
    for fails in (False, True):
        acc = accumulation(nn.Linear(2, 1), 2)
        with suppress(KeyError), acc.micro_batch():
            acc.backward(acc._model(torch.ones(1, 2)).mean())
            if fails:
                raise KeyError
        states.append(acc.state_dict())
    assert states[1]["pending"] is None
    acc.load_state_dict(share_of(states, rank=1, world_size=2))
    assert acc.window.num_pending == 1
    assert acc._tally is not None
    assert acc._tally.weights() == {"loss": 0.0}
    assert share_of([states[0], None], rank=0, world_size=2) is states[0]


@pytest.mark.parametrize("damage", ["missing", "fewer", "shape", "precision", "text"])
def test_foreign_state_is_refused_and_changes_nothing(damage):
    model = nn.Linear(2, 1)
    acc = accumulation(model, 2)
    with acc.micro_batch():
        acc.backward(model(torch.ones(1, 2)).mean())
    state: Any = acc.state_dict()
    if damage == "missing":
        del state["window"]
    elif damage == "fewer":
        state["pending"]["gradients"].pop()
    elif damage == "shape":
        state["pending"]["gradients"][0] = torch.ones(3)
    elif damage == "precision":
        state["precision"] = {"scale": 2.0}
    else:
        state = "state"
    gradients = gradients_of(model)
    with pytest.raises(mb.errors.StateError):
        acc.load_state_dict(state)
    assert acc.window.num_pending == 1
    torch.testing.assert_close(gradients_of(model), gradients, rtol=0, atol=0)
    acc.gradients.release()
    other = accumulation(model, 2)
    with pytest.raises(mb.errors.StateError):
        other.load_state_dict(state)
    assert other.window.num_pending == 0


# --- ranks ---


def on_ranks(counts: list[int], resume_at: int | None) -> tuple[dict[str, Any], list[Any]]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    acc = accumulation(model, 3)
    rank = dist.get_rank()
    states = []
    for index in range(3):
        start = 12 * rank + 4 * index
        part = x[start : start + counts[rank]]
        if index == resume_at:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, acc.state_dict())
            states = everyone
        with acc.micro_batch():
            if len(part):
                acc.backward(model(part).square().mean(), num_samples=len(part))
                acc.backward(model(part).sum() / len(part), num_samples=len(part))
    return gradients_of(model), states


@pytest.mark.parametrize("counts", [[4, 4], [4, 1], [3, 0]], ids=str)
def test_window_over_ranks_equals_full_batch(ranks, counts):
    results = ranks(2).run(on_ranks, counts, None)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    rows = torch.cat([x[12 * r + 4 * i : 12 * r + 4 * i + counts[r]] for r in range(2) for i in range(3)])
    (model(rows).square().mean() + model(rows).mean()).backward()
    for gradients, _ in results:
        assert relative_error(gradients, gradients_of(model)) <= EXACT


def test_window_of_two_ranks_goes_on_in_one_process(ranks):
    (gradients, states), _ = ranks(2).run(on_ranks, [4, 4], 2)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    acc = accumulation(model, 3)
    acc.load_state_dict(share_of(states, rank=0, world_size=1))
    rest = torch.cat([x[8:12], x[20:24]])
    with acc.micro_batch():
        acc.backward(model(rest).square().mean() + model(rest).mean(), num_samples=len(rest))
    assert relative_error(gradients_of(model), gradients) <= EXACT
