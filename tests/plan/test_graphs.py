"""Recorded micro-steps, on a CPU by a tape that does what a CUDA graph does.

The tape runs the same kernels as eager code, so that training with it has to give the same bits; tolerances against
float64 are those of tests/equivalence/test_oracle.py.
"""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch import tree
from macrobatch.plan.graphs import Graphs
from macrobatch.testing.models import CASES, Case
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error
from tests.plan.tape import Recording, Tape

NUM_SAMPLES = 11
SIZES = [3, 3, 3, 2]  # a short last one: two recordings


def taped(**options: Any) -> Graphs:
    return Graphs(Tape(), **options)


def steps_of(graphs: Graphs) -> int:
    return graphs._recorder.num_replays  # type: ignore[union-attr]


def case_of(kind: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(3)
    case = CASES[kind](NUM_SAMPLES)
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
    return Case(case.model.to(dtype), batch, case.loss_fn)


class Counted:
    """A loss function that knows how often its Python has run."""

    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        self.loss_fn = loss_fn
        self.num_calls = 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.num_calls += 1
        return self.loss_fn(model, batch)


class Noisy(nn.Module):
    """Dropout, running statistics, a parameter that is never used and one that only small micro-batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.small = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x_BC: Tensor) -> Tensor:
        logits_BC = self.head(self.body(x_BC))
        return logits_BC * self.small if len(x_BC) < 3 else logits_BC


def classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mb.Loss:
    """Weights are a tensor: the classes above 0."""
    counts_B = (batch[1] > 0).to(batch[0].dtype)
    losses_B = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return mb.Loss((losses_B * counts_B).sum(), counts_B.sum())


def two_terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, mb.Loss]:
    logits_BC = model(batch[0])
    return {
        "classes": mb.Loss(F.cross_entropy(logits_BC, batch[1], reduction="sum"), len(logits_BC)),
        "size": mb.Loss(logits_BC.square().sum(), logits_BC.numel()),
    }


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(NUM_SAMPLES, 5, generator=generator), torch.randint(0, 3, (NUM_SAMPLES,), generator=generator))
        for _ in range(num)
    ]


def cut(batch: Any, sizes: list[int]) -> list[Any]:
    """Micro-batches in memory of their own, as aligned as a recording's: matrix products may round by alignment."""
    return [tree.map_tensors(Tensor.clone, part) for part in tree.split(batch, sizes)]


def trained(
    loss_fn: Any, capture: Any, *, make: Callable[[], nn.Module] = Noisy, num_windows: int = 5, **options: Any
) -> dict[str, Any]:
    """Everything that windows of changing data leave behind."""
    torch.manual_seed(0)
    model = make()
    optimizer = AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = mb.TrainStep(
        model, optimizer, loss_fn, micro_batch=1, scheduler=scheduler, clip_norm=0.5, capture=capture, **options
    )
    results, used = [], []
    for batch in batches(num_windows):
        expected = None
        if loss_fn is two_terms:
            expected = {"classes": NUM_SAMPLES, "size": 3 * NUM_SAMPLES}
        results.append(step.window(cut(batch, SIZES), expected=expected))
        used.append({name: param.grad is not None for name, param in model.named_parameters()})
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "results": [(result.losses, result.weights, result.grad_norm, result.skipped) for result in results],
        "used": used,
        "rate": scheduler.get_last_lr(),
    }


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="macrobatch")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "macrobatch"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "conditional"])
@pytest.mark.parametrize("verifies", [False, True])
def test_replayed_window_equals_full_batch(kind, dtype, tolerance, verifies, lines):
    case = case_of(kind, dtype)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    graphs, loss_fn = taped(verifies=verifies), Counted(case.loss_fn)
    step = mb.TrainStep(case.model, SGD(case.model.parameters(), lr=0.0), loss_fn, micro_batch=1, capture=graphs)
    calls = 0
    for _ in range(6):
        calls = loss_fn.num_calls
        step.window(tree.split(case.batch, SIZES))
        assert relative_error(gradients_of(case.model), reference) <= tolerance
    assert loss_fn.num_calls == calls, "the last window was not replayed"
    assert graphs.num_recordings == 2
    assert lines() == []


@pytest.mark.parametrize("verifies", [False, True])
@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (classes, {}),
        (classes, {"precision": "bf16"}),
        (classes, {"normalize": "uniform"}),
        (weighted, {}),
        (weighted, {"nonfinite": "ignore"}),
        (weighted, {"normalize": mb.Constant(4)}),
        (two_terms, {}),
    ],
    ids=["classes", "bf16", "uniform", "weights", "unread", "constant", "two terms"],
)
def test_training_gives_the_bits_of_eager_training(loss_fn, options, verifies, lines):
    """With dropout, running statistics, parameters that some micro-batches leave unused, clipping, a schedule."""
    eager = trained(loss_fn, None, **options)
    graphs = taped(verifies=verifies)
    assert same(eager, trained(loss_fn, graphs, **options))
    assert steps_of(graphs) > 0
    assert graphs.num_recordings == 2
    assert lines() == []
    assert eager["used"][-1]["small"]
    assert not eager["used"][-1]["unused"]
    assert not same(eager, trained(loss_fn, None, **options, num_windows=4))  # control


def test_loss_scale_may_change_between_windows():
    def fp16() -> mb.Fp16:
        return mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2))

    precision = fp16()
    eager = trained(classes, None, precision=fp16(), make=lambda: nn.Linear(5, 3))
    graphs = taped()
    assert same(eager, trained(classes, graphs, precision=precision, make=lambda: nn.Linear(5, 3)))
    assert precision.scaler.get_scale() > 2.0**4
    assert steps_of(graphs) > 0


def test_dropout_draws_anew_in_every_replay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.0), lambda m, x: m(x).square().mean(), micro_batch=2, capture=taped()
    )
    losses = [step(torch.ones(2, 4)).loss for _ in range(8)]
    assert len(set(losses)) == 8
    state = torch.get_rng_state()
    again = step(torch.ones(2, 4)).loss
    torch.set_rng_state(state)
    assert step(torch.ones(2, 4)).loss == again  # as a resumed run would


def test_losses_are_copied_out():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.0), lambda m, x: m(x).mean(), micro_batch=2, capture=taped()
    )
    data = [torch.randn(6, 4) for _ in range(5)]
    results = [step(batch) for batch in data]
    for batch, result in zip(data, results, strict=True):
        assert result.loss == pytest.approx(float(model(batch).mean().detach()), rel=1e-6)  # float32, a few additions


def test_expected_weights_may_change_between_windows():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(6, 4)
    step = mb.TrainStep(
        model,
        SGD(model.parameters(), lr=0.0),
        lambda m, x: mb.Loss(m(x).square().sum(), (x[:, 0] > 0).sum()),
        micro_batch=2,
        capture=taped(),
    )
    for sign in (1.0, 1.0, -1.0, 1.0):
        batch = x * torch.tensor([sign, 1, 1, 1])
        weight = (batch[:, 0] > 0).sum()
        step.window(tree.split(batch, [2, 2, 2]), expected=weight if sign < 0 else int(weight))
        reference = torch.autograd.grad(model(batch).square().sum() / weight, model.weight)[0]
        torch.testing.assert_close(model.weight.grad, reference, rtol=1e-5, atol=1e-6)  # float32


def replaces_buffers(model: Any, batch: Any) -> Tensor:
    model.register_buffer("mean", model.mean * 0.9 + batch[0].mean() * 0.1)
    return classes(model, batch)


def buffered() -> nn.Module:
    model = nn.Linear(5, 3)
    model.register_buffer("mean", torch.zeros(()))
    return model


def waits(model: Any, batch: Any) -> Tensor:
    loss = classes(model, batch)
    return loss * 2 if loss.item() > 1 else loss


def draws_on_host(model: Any, batch: Any) -> Tensor:
    return classes(model, batch) * random.random()


def changes_its_kind(model: Any, batch: Any) -> Any:
    loss = classes(model, batch)
    return mb.Loss(loss * len(batch[0]), float(len(batch[0]))) if is_recording() else loss


def is_recording() -> bool:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(isinstance(mode, Recording) for mode in modes)


@pytest.mark.parametrize(
    ("loss_fn", "make", "cause"),
    [
        (waits, Noisy, "it waits for the device"),
        (draws_on_host, Noisy, "it draws random numbers on the host, which a replay would not"),
        (replaces_buffers, buffered, "the model replaces its buffers, which a replay would not"),
    ],
    ids=["item", "host draws", "new buffers"],
)
def test_what_cannot_be_recorded_runs_eagerly(loss_fn, make, cause, lines):
    random.seed(1)
    eager = trained(loss_fn, None, make=make)
    random.seed(1)
    graphs = taped()
    assert same(eager, trained(loss_fn, graphs, make=make))
    assert lines() == [f"capture: runs eagerly, since {cause}"]
    assert graphs.num_recordings == 0


class Failing(Tape):
    """A recorder whose recordings break off in the middle of the backward."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def record(self, run: Any) -> Any:
        super().record(run)
        raise self.error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "RuntimeError: operation not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
    ids=["unsupported", "out of memory"],
)
def test_failed_recording_leaves_everything_as_it_was(error, cause, lines):
    assert same(trained(classes, None), trained(classes, Graphs(Failing(error))))
    assert lines() == [f"capture: runs eagerly, since recording failed with {cause}"]


def test_memory_that_runs_out_is_given_back(lines):
    """To whoever runs the window again, in smaller micro-batches."""
    torch.manual_seed(0)
    model, graphs = nn.Linear(5, 3), taped()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        if len(batch[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return classes(model, batch)

    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=3, capture=graphs)
    for batch in batches(3):
        step(batch)
    assert graphs.num_recordings == 2
    with pytest.raises(torch.OutOfMemoryError):
        step.window([batches(1)[0]])
    assert graphs.num_recordings == 0
    for batch in batches(3):
        step(batch)
    assert graphs.num_recordings == 2
    assert lines() == []


def short_of_memory(capture: Any) -> dict[str, Any]:
    """Windows of which some have a micro-batch that does not fit, after others that do."""

    def loss_fn(model: Any, batch: Any) -> Tensor:
        if len(batch[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return classes(model, batch)

    torch.manual_seed(0)
    model = Noisy().double()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.05), loss_fn, micro_batch=mb.Auto(), capture=capture)
    for index, (x, y) in enumerate(batches(8)):
        sizes = [3, 3, 5] if index == 4 else SIZES
        assert step.window(cut((x.double(), y), sizes)).num_micro_batches == 4
    return {**model.state_dict(), "rng": torch.get_rng_state()}


def test_window_that_starts_over_smaller_goes_as_eager_code():
    """But for rounding: what a micro-batch is cut into is not aligned, what it is copied to is."""
    eager, graphs = short_of_memory(None), taped()
    for name, value in short_of_memory(graphs).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-12, atol=1e-13, msg=name)
    assert steps_of(graphs) > 16
    assert graphs._recorder.num_forgotten == 2  # type: ignore[union-attr] # at the start, and for want of memory


class Poisoned(nn.Module):
    """A switch in Python, of which a recording knows only how it stood."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.factor = 1.0

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.linear(x_BC) * self.factor


def poisoned(capture: Any) -> tuple[dict[str, Any], list[float]]:
    torch.manual_seed(0)
    model = Poisoned()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), classes, micro_batch=3, capture=capture)
    norms = []
    for index, batch in enumerate(batches(6)):
        model.factor = 1.0 + (index > 0)  # the recording is made in the first window
        norms.append(step.window(cut(batch, SIZES)).grad_norm)
    return dict(model.state_dict()), norms


def test_verification_catches_a_poisoned_recording(lines):
    eager = poisoned(None)
    assert not same(eager, poisoned(taped()))  # control: nobody looked
    assert lines() == []
    assert same(eager, poisoned(taped(verifies=True)))
    assert len(lines()) == 1
    assert "a replayed micro-batch has the loss" in lines()[0]


class Switching(nn.Module):
    """One of two parameters takes part, in turns, with the same result."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ParameterList([nn.Parameter(torch.ones(5, 3)) for _ in range(2)])
        self.num_calls = 0

    def forward(self, x_BC: Tensor) -> Tensor:
        self.num_calls += 1
        return x_BC @ self.pair[self.num_calls % 2]


def test_verification_sees_which_parameters_were_used(lines):
    trained(classes, taped(verifies=True), make=Switching)
    assert len(lines()) == 1
    assert "a replay uses 1 parameters where the code uses 1, or others" in lines()[0]


class Shifted(Tape):
    """A recorder whose replays are a little off."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def record(self, run: Any) -> Any:
        found, replay = super().record(run)

        def shifted() -> None:
            grads = [param.grad.data for param in self.model.parameters() if param.grad is not None]
            before = [grad.clone() for grad in grads]
            replay()
            for grad, old in zip(grads, before, strict=True):
                grad.copy_(old + (grad - old) * self.factor)

        return found, shifted


@pytest.mark.parametrize(("factor", "num_lines"), [(1 + 1e-5, 0), (1 + 1e-2, 1)])
def test_verification_has_a_bound(factor, num_lines, lines):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    graphs = Graphs(Shifted(model, factor), verifies=True)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=3, capture=graphs)
    for batch in batches(6):
        step(batch)
    assert len(lines()) == num_lines
    assert all("gradient is 1.0e-02 from the code's, beyond 1e-03" in line for line in lines())


@pytest.mark.parametrize("hook", ["forward", "backward", "parameter", "accumulated", "global"])
def test_hooks_are_called(hook, lines):
    """A hook added after the recording is heard of, one taken away lets the replays go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    graphs, calls = taped(), []
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=3, capture=graphs)

    def note(*_: Any) -> None:
        calls.append(1)

    def add() -> Any:
        match hook:
            case "forward":
                return model[1].register_forward_hook(note)
            case "backward":
                return model[1].register_full_backward_hook(note)
            case "parameter":
                return model[1].weight.register_hook(note)
            case "accumulated":
                return model[0].bias.register_post_accumulate_grad_hook(note)
            case _:
                return nn.modules.module.register_module_forward_hook(note)

    data = batches(1)[0]
    step(data)
    step(data)
    handle = add()
    step(data)
    step(data)
    num_calls = len(calls)
    assert num_calls >= 8
    handle.remove()
    before = steps_of(graphs)
    step(data)
    assert len(calls) == num_calls
    assert steps_of(graphs) > before
    assert len(lines()) == 1
    assert "hooks" in lines()[0]


def test_changed_requires_grad_is_recorded_anew(lines):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].requires_grad_(False)
    graphs = taped()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=3, capture=graphs)
    batch = tree.map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batches(1)[0])
    for frozen in (True, False, True):
        model[0].requires_grad_(not frozen)
        reference = full_batch_gradient(model, classes, batch)
        for _ in range(4):
            step(batch)
            assert relative_error(gradients_of(model), reference) <= 1e-12
        assert graphs.num_recordings == 2
    assert lines() == ["capture: records anew, since the trained parameters have changed, or lie elsewhere"]


def test_modes_have_recordings_of_their_own():
    eager, replayed = [], []
    for capture, found in ((None, eager), (taped(), replayed)):
        torch.manual_seed(0)
        model = Noisy()
        step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), classes, micro_batch=3, capture=capture)
        for index, batch in enumerate(batches(12)):
            model.body[1].train(index % 3 > 0)  # a part of the model alone
            step.window(cut(batch, SIZES))
            found.append(copy.deepcopy(model.state_dict()))
    assert same(eager, replayed)


def test_moved_parameters_are_recorded_anew(lines):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=3, capture=taped())
    batch = tree.map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batches(1)[0])
    for scale in (1.0, 2.0):
        model.weight.data = model.weight.data * scale  # the recording reads where the old ones lay
        reference = full_batch_gradient(model, classes, batch)
        for _ in range(4):
            step(batch)
            assert relative_error(gradients_of(model), reference) <= 1e-12
    assert len(lines()) == 1


@pytest.mark.parametrize(
    ("extra", "cause"),
    [
        (np.ones(3), "the batch has a ndarray, which a recording cannot take in"),
        (torch.ones(3).requires_grad_(), "the batch has a tensor that requires grad"),
    ],
    ids=["array", "requires grad"],
)
def test_batches_that_cannot_be_copied_run_eagerly(extra, cause, lines):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    graphs = taped()
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.0), lambda m, b: classes(m, b["data"]), micro_batch=3, capture=graphs
    )
    data = tree.select(batches(1)[0], slice(0, 3))
    for _ in range(4):
        step.window([{"data": data, "extra": extra}])
    assert lines() == [f"capture: runs eagerly, since {cause}"]
    assert steps_of(graphs) == 0


def test_values_of_a_batch_are_part_of_its_form():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1).double(), torch.randn(2, 5, dtype=torch.float64)
    graphs = taped()
    step = mb.TrainStep(
        model,
        SGD(model.parameters(), lr=0.0),
        lambda m, b: m(b["x"]).mean() * b["scale"],
        micro_batch=2,
        capture=graphs,
    )
    for scale in (1, 2, 1.0, True) * 4:
        step.window([{"x": x, "scale": scale}])
        torch.testing.assert_close(model.weight.grad, x.mean(0, keepdim=True) * scale)
    assert graphs.num_recordings == 4


def test_too_many_forms_run_eagerly(lines):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    graphs = taped(max_recordings=2)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=1, capture=graphs)
    batch = tree.map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batches(1)[0])
    reference = full_batch_gradient(model, classes, batch)
    for _ in range(4):
        step.window(tree.split(batch, [1, 2, 3, 5]))
        assert relative_error(gradients_of(model), reference) <= 1e-12
    assert graphs.num_recordings == 2
    assert lines() == ["capture: runs eagerly, since there are more than 2 forms of micro-batch; further ones"]


def test_closures_replay():
    found = []
    for capture in (None, taped()):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        step = mb.TrainStep(model, LBFGS(model.parameters(), max_iter=4), classes, micro_batch=3, capture=capture)
        losses = [step(batch).loss for batch in batches(3)]
        found.append((losses, copy.deepcopy(model.state_dict())))
    assert same(*found)
    assert steps_of(capture) > 0


def test_failed_window_with_replays_changes_nothing():
    torch.manual_seed(0)
    model = Noisy()
    optimizer = SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, classes, micro_batch=3, capture=taped())
    for batch in batches(3):
        step(batch)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = batches(1)[0]
    with pytest.raises(mb.errors.NonFiniteError, match="micro-batch 2"):
        step((x.index_fill(0, torch.tensor([7]), torch.nan), y))
    assert same(state, dict(model.state_dict()))
    assert torch.equal(rng, torch.get_rng_state())


def test_a_kind_of_loss_that_changes_is_not_recorded(lines):
    assert same(trained(classes, None), trained(changes_its_kind, taped()))
    assert lines() == [
        "capture: runs eagerly, since loss_fn does not return the same kind of loss for each micro-batch"
    ]


def test_a_module_in_the_place_of_a_freed_one_is_noticed():
    """Where its address is the same, too; a recording of the other one would give another gradient."""
    found = []
    for capture in (None, taped()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
        step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=1, capture=capture)
        for index in range(6):
            model[1] = None
            model[1] = nn.Tanh() if index % 2 else nn.GELU()
            step(batches(1)[0])
            found.append(gradients_of(model))
    for plain, replayed in zip(found[:6], found[6:], strict=True):
        assert relative_error(replayed, plain) < 1e-6
    assert steps_of(capture) > 0


@pytest.mark.filterwarnings("ignore:grad and param do not obey:UserWarning")  # eagerly, too
def test_a_weight_turned_where_it_lies_is_noticed():
    found = []
    for capture in (None, taped()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
        step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=1, capture=capture)
        step(batches(1)[0])
        before = gradients_of(model)
        model[0].weight.data = model[0].weight.data.t()
        step(batches(1)[0])
        found.append(gradients_of(model))
        assert relative_error(found[-1], before) > 1e-2  # the control
    assert relative_error(found[1], found[0]) < 1e-6


def test_sparse_gradients_are_not_recorded(lines):
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(ids).square().mean()

    torch.manual_seed(0)
    model, ids = nn.Embedding(7, 4, sparse=True), torch.randint(0, 7, (12, 3))
    exact = full_batch_gradient(nn.Embedding.from_pretrained(model.weight.data, freeze=False), loss, ids)
    optimizer = SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, loss, micro_batch=1, sparse_grad="densify", capture=taped())
    step(ids)
    assert relative_error(gradients_of(model), exact) < 1e-6
    assert lines() == ["capture: runs eagerly, since a Embedding makes sparse gradients, which differ in size"]


class Additions(TorchDispatchMode):
    """How often something was added in place, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Shared(nn.Module):
    """A large weight, and small parameters, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.head = nn.Linear(5, 2**14), nn.Linear(2**14, 2), nn.Linear(2, 3)
        self.factor = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.head(torch.tanh(self.small(self.large(x_BC)) * self.factor) * self.factor)


def test_small_gradients_are_added_by_one_operation():
    torch.manual_seed(0)
    model, batch = (
        Shared().double(),
        tree.map_tensors(lambda x: x.double() if x.is_floating_point() else x, batches(1)[0]),
    )
    assert [p.numel() > 2**16 for p in model.parameters()].count(True) == 1
    exact = full_batch_gradient(copy.deepcopy(model), classes, batch)
    found: dict[bool, Counter[str]] = {}
    for is_taped in (True, False):
        twin = copy.deepcopy(model)
        step = mb.TrainStep(
            twin, SGD(twin.parameters(), lr=0.0), classes, micro_batch=1, capture=taped() if is_taped else None
        )
        step(batch)
        with Additions() as additions:
            step(batch)
        found[is_taped] = additions.counts
        assert relative_error(gradients_of(twin), exact) < 1e-12
    assert found[True]["_foreach_add_"] == NUM_SAMPLES
    # What is left: the large weight, and the second use of the factor.
    assert found[True]["add_"] <= 2 * NUM_SAMPLES
    assert found[False]["_foreach_add_"] == 0  # the control: eagerly, one for each of seven parameters
    assert found[False]["add_"] >= 7 * NUM_SAMPLES


def test_one_object_serves_one_step():
    graphs, model = taped(), nn.Linear(5, 3)
    mb.TrainStep(model, SGD(model.parameters(), lr=0.1), classes, micro_batch=3, capture=graphs)
    with pytest.raises(mb.errors.ArgumentError, match="another step"):
        mb.TrainStep(model, SGD(model.parameters(), lr=0.1), classes, micro_batch=3, capture=graphs)
