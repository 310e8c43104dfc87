"""Loops that accumulate without `accumulate`: by `no_sync`, by `model.no_sync`, or by not stepping. The original adds
the backwards up and divides them by N; what a script does with that, the guide's own recipe for tokens among them, has
to come out the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from macrobatch.accelerate import Accelerator
from macrobatch.errors import ArgumentError, LossError, WindowError
from tests.accelerate.doors import BOTH, ORIGINAL, OURS, entered, of_both

pytestmark = pytest.mark.xdist_group("ranks")

IGNORED = -100


def token_batches(num: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of four sequences of 12 tokens, of which other numbers have labels."""
    generator = torch.Generator().manual_seed(0)
    x_NTC = torch.randn(4 * num, 12, 5, generator=generator)
    y_NT = torch.randint(0, 3, (4 * num, 12), generator=generator)
    lengths = torch.randint(1, 12, (4 * num, 1), generator=generator)
    y_NT[torch.arange(12) >= lengths] = IGNORED
    return list(zip(x_NTC.split(4), y_NT.split(4), strict=True))


def recipe(package: str, num_steps: int, num_batches: int) -> Tensor:
    """The guide's recipe for causal language models: sums of losses, over all items of a window of all ranks."""
    with entered(package) as door:
        accelerator = door.Accelerator(gradient_accumulation_steps=num_steps, cpu=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        data = [(x, y) for xs, ys in token_batches(num_batches) for x, y in zip(xs, ys, strict=True)]
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
        batches = list(loader)
        for start in range(0, len(batches), num_steps):
            window = batches[start : start + num_steps]
            num_items = sum((y != IGNORED).sum() for _, y in window)
            num_items = accelerator.gather(num_items).sum().item()
            for index, (x, y) in enumerate(window):
                apart = index < len(window) - 1 and accelerator.num_processes > 1
                with model.no_sync() if apart else nullcontext():
                    logits = model(x).flatten(0, 1)
                    loss = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORED, reduction="sum")
                    accelerator.backward(loss * num_steps * accelerator.num_processes / num_items)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])


def full_batch(num_together: int, num_batches: int) -> Tensor:
    """The same training in float64, each window at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model.load_state_dict(start.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = token_batches(num_batches)
    for first in range(0, num_batches, num_together):
        xs, ys = zip(*batches[first : first + num_together], strict=True)
        logits = model(torch.cat(xs).double()).flatten(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.cat(ys).flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("num_steps", "num_batches"), [(1, 4), (2, 6), (4, 8), (4, 10)])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_recipe_for_tokens_is_the_full_batch(ranks: Any, num_ranks: int, num_steps: int, num_batches: int):
    num_batches *= num_ranks
    theirs, ours = of_both(ranks, num_ranks, recipe, num_steps, num_batches)
    expected = full_batch(num_steps * num_ranks, num_batches)
    for weights in ours:
        assert torch.equal(weights, ours[0])
        # Weights of about 1 in float32, a few hundred roundings.
        torch.testing.assert_close(weights.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)


def by_hand(package: str, num_steps: int, every: int, *, holds: bool, prepares: bool) -> list[float]:
    """The gradients that a loop sees which steps after `every` batches."""
    with entered(package) as door:
        accelerator = door.Accelerator(gradient_accumulation_steps=num_steps, cpu=True)
        model = nn.Linear(1, 1, bias=False)
        weight = model.weight
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model, loader = accelerator.prepare(model, DataLoader(torch.arange(1.0, 17.0).view(16, 1), batch_size=2))
        seen: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(float(weight.grad)))
        if prepares:
            optimizer = accelerator.prepare(optimizer)
        for index, batch in enumerate(loader, start=1):
            is_last = index % every == 0
            with nullcontext() if is_last or not holds else accelerator.no_sync(model):
                accelerator.backward(model(batch).mean())
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
        return seen


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("prepares", [True, False], ids=["prepared", "own optimizer"])
@pytest.mark.parametrize("holds", [True, False], ids=["no_sync", "plain"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sums_of_backwards_are_the_originals(ranks: Any, num_ranks: int, holds: bool, prepares: bool, num_steps: int):
    theirs, ours = of_both(ranks, num_ranks, hand_job, num_steps, holds, prepares)
    assert ours[0] == theirs[0]
    assert len(ours[0]) == 4 // num_ranks


def hand_job(package: str, num_steps: int, holds: bool, prepares: bool) -> list[float]:
    return by_hand(package, num_steps, 2, holds=holds, prepares=prepares)


def test_a_forgotten_accumulate_is_told_once_and_steps_on_whole_gradients():
    with pytest.warns(UserWarning, match="gradient_accumulation_steps=4, .with"):
        ours = by_hand(OURS, 4, 1, holds=False, prepares=True)
    theirs = by_hand(ORIGINAL, 4, 1, holds=False, prepares=True)
    assert [4 * t for t in theirs] == ours  # in silence, a quarter of each


def test_a_short_last_window_of_a_loop_by_hand_is_not_taken_for_a_forgotten_accumulate():
    def steps(package: str) -> list[float]:
        with entered(package) as door:
            accelerator = door.Accelerator(gradient_accumulation_steps=2, cpu=True)
            model = nn.Linear(1, 1, bias=False)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            weight = model.weight
            model, optimizer = accelerator.prepare(model, optimizer)
            seen: list[float] = []
            for window in ([1.0, 3.0], [5.0]):
                for x in window:
                    accelerator.backward(model(torch.tensor([[x]])).mean())
                before = weight.item()
                optimizer.step()
                seen.append(round(before - weight.item(), 5))
                optimizer.zero_grad()
            return seen

    assert steps(ORIGINAL) == steps(OURS) == [2.0, 2.5]


def no_sync_of(package: str) -> tuple[bool, bool]:
    import copy
    import pickle

    with entered(package) as door:
        model = door.Accelerator(cpu=True).prepare(nn.Linear(2, 2))
        copies = [copy.deepcopy(model)] if package == ORIGINAL else [pickle.loads(pickle.dumps(model))]
        with model.no_sync(), copies[0].no_sync():
            pass
        return hasattr(model, "no_sync"), set(door.Accelerator().unwrap_model(model).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("package", BOTH)
def test_models_have_no_sync_where_there_are_ranks(ranks: Any, package: str):
    assert ranks(2).run(no_sync_of, package) == [(True, True)] * 2


def beside(package: str, num_steps: int, *, in_blocks: bool) -> list[list[float]]:
    """The gradients of a model that is not prepared, whose losses go through the accelerator's backward between those
    of one that is; of both after every turn, the second of which is reduced and the others of which are held."""
    with entered(package) as door:
        accelerator = door.Accelerator(gradient_accumulation_steps=num_steps, cpu=True)
        prepared, plain = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        weights = prepared.weight, plain.weight
        optimizers = [torch.optim.SGD(prepared.parameters(), lr=0.1)] if in_blocks else []
        prepared = accelerator.prepare(prepared, *optimizers)
        prepared = prepared[0] if in_blocks else prepared
        x = torch.full((2, 1), 1.0 + accelerator.process_index)
        seen: list[list[float]] = []
        for turn in range(3):
            if in_blocks:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(x).mean())
                    accelerator.backward(plain(x).mean())
            else:
                accelerator.backward(plain(x).mean())
                with nullcontext() if turn == 1 else accelerator.no_sync(prepared):
                    accelerator.backward(prepared(x).mean())
            seen.append([weight.grad.item() for weight in weights])
        return seen


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("in_blocks", [False, True], ids=["held", "in blocks"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_model_that_is_not_prepared_gets_the_originals_gradient(
    ranks: Any, num_ranks: int, in_blocks: bool, num_steps: int
):
    jobs = of_both(ranks, num_ranks, beside_job, num_steps, in_blocks)
    turns = {1: [0, 1, 2], 2: [2] if in_blocks else [1]}[num_ranks]  # where a held gradient is that of one rank
    for rank, (theirs, ours) in enumerate(zip(*jobs, strict=True)):
        expected = [(1.0 + rank) * turn / num_steps for turn in (1, 2, 3)]
        # float32, a rounding or two
        assert [plain for _, plain in ours] == pytest.approx(expected, rel=1e-6)
        assert [plain for _, plain in theirs] == pytest.approx(expected, rel=1e-6)
        if num_steps == 3 or not in_blocks:
            assert [ours[t][0] for t in turns] == pytest.approx([theirs[t][0] for t in turns], rel=1e-6)


def beside_job(package: str, num_steps: int, in_blocks: bool) -> list[list[float]]:
    return beside(package, num_steps, in_blocks=in_blocks)


def prepared_later(package: str) -> list[float]:
    """A gradient that is held while another model is prepared, and both after that one's reduction."""
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        x = torch.full((1, 1), 1.0 + accelerator.process_index)
        first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        weights = first.weight, second.weight
        first = accelerator.prepare(first)
        with accelerator.no_sync(first):
            accelerator.backward(first(x).sum())
        second = accelerator.prepare(second)
        accelerator.backward(second(x).sum())
        return [weight.grad.item() for weight in weights]


@pytest.mark.parametrize("package", BOTH)
def test_a_gradient_that_is_held_outlives_the_preparation_of_another_model(ranks: Any, package: str):
    assert ranks(2).run(prepared_later, package) == [[1.0, 1.5], [2.0, 1.5]]


def behind_a_checkpoint(package: str, in_blocks: bool) -> list[float]:
    """The gradient of a model of which the graph shows nothing: only a re-entrant checkpoint of it."""
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        module = nn.Linear(1, 1, bias=False)
        weight = module.weight
        model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.0))
        x = torch.full((1, 1), 1.0 + accelerator.process_index, requires_grad=True)
        with accelerator.accumulate(model) if in_blocks else nullcontext():
            accelerator.backward(checkpoint(model, x, use_reentrant=True).sum())
            optimizer.step()
        return weight.grad.flatten().tolist()


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_model_behind_a_checkpoint_is_reduced(ranks: Any, in_blocks: bool):
    assert ranks(2).run(behind_a_checkpoint, OURS, in_blocks) == [[1.5], [1.5]]


def by_hand_over_ranks(package: str, kind: str, num_optimizers: int, holds: str) -> Tensor:
    """Weights after each of five updates, of two micro-batches each, without a block. Plain, sharded or wrapped."""
    with entered(package) as door:
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "plain": {},
            "sharded": {"fsdp_plugin": door.FullyShardedDataParallelPlugin()},
            "wrapped": {"kwargs_handlers": [door.DistributedDataParallelKwargs()]},
        }[kind]
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        model: Any = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        trained = [model] if num_optimizers == 1 else [model[0], model[2]]
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in trained]
        model, *optimizers = accelerator.prepare(model, *optimizers)
        after: list[Tensor] = []
        for x, y in torch.randn(5, 2, 4, 3, 2)[:, :, accelerator.process_index]:
            held = {
                "": nullcontext,
                "accelerator": lambda: accelerator.no_sync(model),
                "model": lambda: model.no_sync(),
            }
            with held[holds]():
                accelerator.backward(model(x).square().mean())
            if holds == "" and num_optimizers == 2:
                optimizers[1].zero_grad()  # what its parameters have got is another's loss
            accelerator.backward(model(y).square().mean())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            whole = [getattr(param, "full_tensor", lambda param=param: param)() for param in model.parameters()]
            after.append(torch.cat([param.detach().flatten() for param in whole]))
        return torch.stack(after)


@pytest.mark.parametrize("holds", ["", "accelerator", "model"])
@pytest.mark.parametrize("num_optimizers", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "sharded", "wrapped"])
def test_what_is_held_by_hand_is_reduced_before_the_step(ranks: Any, kind: str, num_optimizers: int, holds: str):
    """Of gradients that FSDP2 holds from the third window on, and DDP in its `no_sync`, nobody says in front of a
    backward outside of a block that it is the last."""
    expected = ranks(2).run(by_hand_over_ranks, ORIGINAL, "plain", num_optimizers, holds)[0]
    for weights in ranks(2).run(by_hand_over_ranks, OURS, kind, num_optimizers, holds):
        # Weights of about 1 in float32, a few roundings.
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def fresh() -> tuple[Any, nn.Linear, Any]:
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def one_window(accelerator: Any, model: nn.Linear, optimizer: Any) -> Tensor:
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach().clone()


@pytest.mark.parametrize("bad", ["a constant", "a matrix"])
def test_a_backward_that_fails_outside_of_blocks_leaves_nothing_behind(bad: str):
    with entered(OURS):
        expected = one_window(*fresh())
    with entered(OURS):
        accelerator, model, optimizer = fresh()
        loss = torch.tensor(1.0) if bad == "a constant" else model(torch.ones(2, 4))
        with pytest.raises(LossError, match="the loss: given"):
            accelerator.backward(loss)
        assert torch.equal(one_window(accelerator, model, optimizer), expected)


def test_a_block_does_not_begin_over_gradients_that_wait_for_their_step():
    with entered(OURS):
        expected = one_window(*fresh())
    with entered(OURS):
        accelerator, model, optimizer = fresh()
        accelerator.backward(model(torch.ones(2, 4)).sum())
        with pytest.raises(WindowError, match=r"accumulate: given .* call optimizer\.step\(\) or "):
            one_window(accelerator, model, optimizer)
        optimizer.zero_grad()
        assert torch.equal(one_window(accelerator, model, optimizer), expected)


@pytest.mark.parametrize("limit", [-1.0, float("nan"), "1", True], ids=str)
@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
@pytest.mark.parametrize("original", [False, True], ids=["", "original"])
def test_a_limit_that_turns_gradients_around_is_refused(limit: Any, clip: str, original: bool):
    with entered(OURS) as door:
        plugin = door.utils.GradientAccumulationPlugin(original=original)
        accelerator = door.Accelerator(gradient_accumulation_plugin=plugin, cpu=True)
        model = nn.Linear(4, 3)
        before = model.weight.detach().clone()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).sum())
            with pytest.raises(ArgumentError, match="expected a number >= 0, or infinity"):
                getattr(accelerator, clip)(model.parameters(), limit)
            optimizer.zero_grad()
        assert torch.equal(model.weight, before)
