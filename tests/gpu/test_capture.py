"""Micro-steps recorded as CUDA graphs, and compiled ones with graphs of torch's own. Skipped without a GPU.

What does not need a GPU is in tests/plan/test_graphs.py, on a CPU twin of CUDA graphs. Tolerances: as in
tests/equivalence/test_oracle.py; TF32 is off. Where captured and eager training are compared, both run the same kernels
on the same numbers, and what may differ is the order in which atomic additions arrive: 1e-5 in float32 after a few
updates.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
import macrobatch.colossalai as colossalai
from macrobatch import tree
from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.utils import TorchDynamoPlugin
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.plan.capture import compile_forward
from macrobatch.plan.graphs import Graphs
from macrobatch.testing.models import CASES, Case
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # torch.compile's advice
]

NUM_SAMPLES = 29
SIZES = [7, 7, 7, 7, 1]  # a short last one: two recordings


@pytest.fixture(autouse=True)
def exact_matmuls() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="macrobatch")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "macrobatch"]


def case_of(kind: str, dtype: torch.dtype, *, on_host: bool = False) -> tuple[Case, dict[str, Tensor | None]]:
    """A case on the GPU, and the float64 gradient of its batch."""
    torch.manual_seed(11)
    case = CASES[kind](NUM_SAMPLES)
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
    reference = full_batch_gradient(case.model.to(dtype), case.loss_fn, batch)
    if not on_host:
        batch = tree.to_device(batch, torch.device("cuda"))
    return Case(case.model.cuda(), batch, case.loss_fn), {
        name: None if gradient is None else gradient.cuda() for name, gradient in reference.items()
    }


class Counted:
    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        self.loss_fn = loss_fn
        self.num_calls = 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.num_calls += 1
        return self.loss_fn(model, batch)


@pytest.mark.parametrize("on_host", [False, True], ids=["on device", "on host"])
@pytest.mark.parametrize("verifies", [False, True], ids=["graph", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "conditional"])
def test_replayed_window_equals_full_batch(kind, dtype, tolerance, verifies, on_host, lines):
    case, reference = case_of(kind, dtype, on_host=on_host)
    graphs, loss_fn = Graphs(verifies=verifies), Counted(case.loss_fn)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    step = mb.TrainStep(case.model, optimizer, loss_fn, micro_batch=1, capture=graphs)
    calls = 0
    for _ in range(6):
        calls = loss_fn.num_calls
        step.window(tree.split(case.batch, SIZES))
        assert relative_error(gradients_of(case.model), reference) <= tolerance
    assert lines() == []
    assert graphs.num_recordings == 2
    assert loss_fn.num_calls == calls, "the last window was not replayed"


@pytest.mark.parametrize("capture", ["graph", "auto"])
def test_captures_by_name(capture, lines):
    case, reference = case_of("mlp", torch.float64)
    loss_fn = Counted(case.loss_fn)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    step = mb.TrainStep(case.model, optimizer, loss_fn, micro_batch=7, capture=capture)
    calls = 0
    for _ in range(6):
        calls = loss_fn.num_calls
        step(case.batch)
        assert relative_error(gradients_of(case.model), reference) <= 1e-12
    assert loss_fn.num_calls == calls
    assert lines() == []


class Noisy(nn.Module):
    """Dropout, running statistics, a parameter that is never used and one that only small micro-batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Dropout(0.4), nn.Tanh())
        self.head = nn.Linear(32, 3)
        self.small = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x_BC: Tensor) -> Tensor:
        logits_BC = self.head(self.body(x_BC))
        return logits_BC * self.small if len(x_BC) < 3 else logits_BC


def classes(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def weighted(model: Any, batch: tuple[Tensor, Tensor]) -> mb.Loss:
    """Weights are a tensor on the device: the classes above 0."""
    counts_B = (batch[1] > 0).to(batch[0].dtype)
    losses_B = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return mb.Loss((losses_B * counts_B).sum(), counts_B.sum())


def two_terms(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, mb.Loss]:
    logits_BC = model(batch[0])
    return {
        "classes": mb.Loss(F.cross_entropy(logits_BC, batch[1], reduction="sum"), len(logits_BC)),
        "size": mb.Loss(logits_BC.square().sum(), logits_BC.numel()),
    }


def batches(num: int, num_samples: int = 11) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(num_samples, 5, generator=generator).cuda(),
            torch.randint(0, 3, (num_samples,), generator=generator).cuda(),
        )
        for _ in range(num)
    ]


def trained(
    loss_fn: Any, capture: Any, *, make: Callable[[], nn.Module] = Noisy, num_windows: int = 6, **options: Any
) -> dict[str, Any]:
    """What windows of changing data leave behind."""
    torch.manual_seed(0)
    random.seed(0)
    model = make().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)  # a larger eps forgives tiny gradients
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = mb.TrainStep(
        model, optimizer, loss_fn, micro_batch=1, scheduler=scheduler, clip_norm=0.5, capture=capture, **options
    )
    results, used = [], []
    for batch in batches(num_windows):
        expected = {"classes": 11, "size": 33} if loss_fn is two_terms else None
        results.append(step.window(tree.split(batch, [3, 3, 3, 2]), expected=expected))
        used.append({name for name, param in model.named_parameters() if param.grad is not None})
    return {
        "state": {name: value.double() for name, value in model.state_dict().items()},
        "rng": torch.cuda.get_rng_state(),
        "losses": [result.loss for result in results],
        "weights": [result.weights for result in results],
        "norms": [result.grad_norm for result in results],
        "used": used,
        "rate": scheduler.get_last_lr(),
    }


def assert_alike(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert one["used"] == other["used"]
    assert one["rate"] == other["rate"]
    assert torch.equal(one["rng"], other["rng"])
    assert one["weights"] == other["weights"]
    assert one["losses"] == pytest.approx(other["losses"], rel=tolerance)
    assert one["norms"] == pytest.approx(other["norms"], rel=tolerance)
    for name, value in one["state"].items():
        torch.testing.assert_close(value, other["state"][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("verifies", [False, True], ids=["graph", "auto"])
@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (classes, {}),
        (classes, {"normalize": "uniform"}),
        (weighted, {}),
        (weighted, {"nonfinite": "ignore"}),
        (weighted, {"normalize": mb.Constant(4)}),
        (two_terms, {}),
    ],
    ids=["classes", "uniform", "weights", "unread", "constant", "two terms"],
)
def test_training_goes_as_eager_training(loss_fn, options, verifies, lines):
    """Dropout and running statistics included: a replay draws what eager code would have drawn."""
    eager = trained(loss_fn, None, **options)
    graphs = Graphs(verifies=verifies)
    assert_alike(eager, trained(loss_fn, graphs, **options))
    assert graphs.num_recordings == 2
    assert lines() == []
    assert "small" in eager["used"][-1]
    assert "unused" not in eager["used"][-1]


@pytest.mark.parametrize("verifies", [False, True], ids=["graph", "auto"])
def test_bf16_training_goes_as_eager_training(verifies, lines):
    eager = trained(classes, None, precision="bf16")
    graphs = Graphs(verifies=verifies)
    assert_alike(eager, trained(classes, graphs, precision="bf16"), tolerance=2e-2)  # 2^-8, over a few updates
    assert graphs.num_recordings == 2
    assert lines() == []


def test_fp16_loss_scale_changes_between_windows(lines):
    def fp16() -> mb.Fp16:
        return mb.Fp16("cuda", torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=2))

    precision, graphs = fp16(), Graphs()
    eager = trained(classes, None, precision=fp16())
    assert_alike(eager, trained(classes, graphs, precision=precision), tolerance=2e-2)  # as for bf16
    assert precision.scaler.get_scale() > 2.0**8
    assert graphs.num_recordings == 2
    assert lines() == []


def test_overflow_of_a_replay_skips_the_update():
    model = nn.Linear(4, 1).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=1000)
    graphs = Graphs()
    step = mb.TrainStep(
        model,
        optimizer,
        lambda model, x: model(x).square().mean(),
        micro_batch=2,
        precision=mb.Fp16("cuda", scaler),
        capture=graphs,
    )
    x = torch.ones(8, 4, device="cuda")
    assert [step(x).skipped for _ in range(2)] == [None, None]
    assert graphs.num_recordings == 1
    scaler.update(2.0**40)
    assert step(x).skipped == "overflow"
    assert scaler.get_scale() == 2.0**39
    scaler.update(2.0**8)
    assert step(x).skipped is None


def test_dropout_draws_anew_and_resumes_with_the_same_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).cuda()
    graphs = Graphs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch=2, capture=graphs)
    x = torch.ones(4, 4, device="cuda")
    assert len({step(x).loss for _ in range(8)}) == 8
    assert graphs.num_recordings == 1
    state = torch.cuda.get_rng_state()
    first = [step(x).loss for _ in range(3)]
    torch.cuda.set_rng_state(state)
    assert [step(x).loss for _ in range(3)] == first


def test_failed_window_of_replays_changes_nothing():
    torch.manual_seed(0)
    model = Noisy().cuda()
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), classes, micro_batch=3, capture=Graphs())
    for batch in batches(4):
        step(batch)
    state, rng = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state()
    x, y = batches(1)[0]
    x = x.clone()
    x[7] = torch.nan
    with pytest.raises(mb.errors.NonFiniteError, match="micro-batch 2"):
        step((x, y))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.cuda.get_rng_state())


def waits(model: Any, batch: Any) -> Tensor:
    loss = classes(model, batch)
    return loss * 2 if loss.item() > 1 else loss


def waits_in_backward(model: Any, batch: Any) -> Tensor:
    return Reads.apply(classes(model, batch))  # type: ignore[no-any-return]


class Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * (1.0 if grads[0].item() > 0 else 2.0)


def draws_on_host(model: Any, batch: Any) -> Tensor:
    return classes(model, batch) * (1 + random.random())


@pytest.mark.parametrize(
    ("loss_fn", "cause"),
    [
        (waits, "waits for the device"),
        (waits_in_backward, "waits for the device"),
        (draws_on_host, "draws random numbers on the host"),
    ],
    ids=["item", "item in backward", "host draws"],
)
@pytest.mark.parametrize("verifies", [False, True], ids=["graph", "auto"])
def test_what_cannot_be_recorded_runs_eagerly(loss_fn, cause, verifies, lines):
    eager = trained(loss_fn, None)
    graphs = Graphs(verifies=verifies)
    assert_alike(eager, trained(loss_fn, graphs))
    assert graphs.num_recordings == 0
    assert len(lines()) == 1
    assert cause in lines()[0]


class Whole(nn.Module):
    """Waits for the device when it is recorded, and only then: nothing can be seen of that beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.4), nn.Linear(32, 3))

    def forward(self, x_BC: Tensor) -> Tensor:
        hidden_BC = self.body[1](self.body[0](x_BC))
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return self.body[2](hidden_BC)


def test_failed_recording_leaves_everything_as_it_was(lines):
    """The recording breaks off after a dropout: stream, allocator, generator and gradients must be sound after it."""
    graphs = Graphs()
    assert_alike(trained(classes, None, make=Whole), trained(classes, graphs, make=Whole))
    assert graphs.num_recordings == 0
    assert len(lines()) == 1
    assert "recording failed" in lines()[0]
    other = Graphs()  # and the next one can be made
    assert_alike(trained(classes, None), trained(classes, other))
    assert other.num_recordings == 2


class Poisoned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.num_calls = 0

    def forward(self, x_BC: Tensor) -> Tensor:
        self.num_calls += 1
        return self.linear(x_BC) * (1 + self.num_calls % 2)


def test_verification_catches_a_poisoned_recording(lines):
    """Python counts the calls: a recording keeps to one branch."""
    torch.manual_seed(0)
    model = Poisoned().cuda()
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), classes, micro_batch=3, capture="auto")
    for batch in batches(4):
        step(batch)
    assert len(lines()) == 1
    assert "a replayed micro-batch" in lines()[0]


def test_hooks_frozen_parameters_and_modes(lines):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double().cuda()
    graphs, calls = Graphs(), []
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), classes, micro_batch=3, capture=graphs)
    batch = tree.map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batches(1)[0])

    def check() -> None:
        reference = full_batch_gradient(model, classes, batch)
        for _ in range(4):
            step(batch)
            assert relative_error(gradients_of(model), reference) <= 1e-12

    check()
    model[0].requires_grad_(False)
    check()
    model[0].requires_grad_(True)
    check()
    model.eval()
    check()
    model.train()
    handle = model[2].weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    check()
    assert len(calls) == 16
    handle.remove()
    check()
    assert len(calls) == 16
    assert len(lines()) == 2  # recorded anew, hooks
    assert graphs.num_recordings == 4  # two forms, in training and in evaluation


def test_a_replayed_window_never_waits_for_the_device():
    torch.manual_seed(0)
    model = Noisy().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = mb.TrainStep(
        model, optimizer, weighted, micro_batch=4, clip_norm=1.0, nonfinite="ignore", capture=Graphs(), precision="bf16"
    )
    batch = tuple(leaf.cpu().pin_memory() for leaf in batches(1, 31)[0])
    for _ in range(5):
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.loss > 0


def test_graph_of_a_compiled_model(lines):
    case, reference = case_of("tied_lm", torch.float32)
    compiled: Any = torch.compile(case.model, dynamic=False)
    graphs = Graphs()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    step = mb.TrainStep(
        case.model, optimizer, lambda _, batch: case.loss_fn(compiled, batch), micro_batch=7, capture=graphs
    )
    for _ in range(5):
        step(case.batch)
        assert relative_error(gradients_of(case.model), reference) <= 1e-6
    assert graphs.num_recordings == 2
    assert lines() == []


@pytest.mark.parametrize("kind", ["mlp", "conv", "tied_lm", "lora", "embedding"])
def test_compiled_window_equals_full_batch(kind, lines):
    case, reference = case_of(kind, torch.float32)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    step = mb.TrainStep(case.model, optimizer, case.loss_fn, micro_batch=1, capture="compile")
    results = []
    for _ in range(6):
        results.append(step.window(tree.split(case.batch, SIZES)))
        assert relative_error(gradients_of(case.model), reference) <= 1e-6
    assert [result.loss for result in results] == pytest.approx([results[0].loss] * 6, rel=1e-5)  # copied out in time
    assert lines() == []
    assert step._step.micro_step.num_recordings == 2  # type: ignore[attr-defined]


def test_compiled_dropout_draws_anew_in_every_replay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch=2, capture="compile")
    x = torch.ones(2, 4, device="cuda")
    assert len({step(x).loss for _ in range(8)}) == 8
    state = torch.cuda.get_rng_state()
    first = [step(x).loss for _ in range(3)]
    torch.cuda.set_rng_state(state)
    assert [step(x).loss for _ in range(3)] == first


def error_by_hand(model: nn.Module, x: Tensor, y: Tensor, *, keeps_gradients: bool) -> float:
    """Of a careful loop with reduce-overhead, in windows of 4; infinite if PyTorch raises.

    Gradients are zeroed in place between windows, or None.
    """
    reference = full_batch_gradient(model, classes, (x, y))
    compiled = torch.compile(model, mode="reduce-overhead")
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    try:
        for _ in range(4):
            model.zero_grad(set_to_none=not keeps_gradients)
            for x_part, y_part in zip(x.chunk(4), y.chunk(4), strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                (F.cross_entropy(compiled(x_part), y_part) / 4).backward()
        return relative_error(gradients_of(model), reference)
    except RuntimeError as error:
        if "overwritten" not in str(error):
            raise
        return math.inf


def test_reduce_overhead_needs_persistent_gradients():
    """Both sides: with `.grad` None between windows PyTorch raises or sums wrongly; with the buffer it is right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.GELU(), nn.Linear(64, 3)).cuda()
    x, y = batches(1, 16)[0]
    reference = full_batch_gradient(model, classes, (x, y))
    assert error_by_hand(copy.deepcopy(model), x, y, keeps_gradients=False) > 1e-3
    torch._dynamo.reset()
    assert error_by_hand(copy.deepcopy(model), x, y, keeps_gradients=True) <= 1e-6
    torch._dynamo.reset()
    compile_forward(model, {"mode": "reduce-overhead"})

    def loss_fn(model: Any, batch: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return classes(model, batch)

    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=4)
    for _ in range(5):
        step((x, y))
        assert relative_error(gradients_of(model), reference) <= 1e-6


def test_accelerator_with_reduce_overhead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.GELU(), nn.Linear(64, 3)).cuda()
    x, y = batches(1, 16)[0]
    reference = full_batch_gradient(model, classes, (x, y))
    plugin = TorchDynamoPlugin(backend="inductor", mode="reduce-overhead")
    accelerator = Accelerator(gradient_accumulation_steps=4, dynamo_plugin=plugin)
    seen: dict[str, Tensor | None] = {}
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    plain.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
    model, optimizer = accelerator.prepare(model, plain)
    kept = []
    for _ in range(5):
        for part in zip(x.chunk(4), y.chunk(4), strict=True):
            with accelerator.accumulate(model):
                kept.append(model(part[0]))
                accelerator.backward(F.cross_entropy(kept[-1], part[1]))
                optimizer.step()
                optimizer.zero_grad()
        assert relative_error(seen, reference) <= 1e-6
    first, last = torch.cat(kept[:4]), torch.cat(kept[-4:])
    torch.testing.assert_close(first, last, rtol=1e-5, atol=1e-6)  # what the model returned is not overwritten


def test_engine_with_reduce_overhead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.GELU(), nn.Linear(64, 3)).cuda()
    x, y = batches(1, 16)[0]
    reference = full_batch_gradient(model, classes, (x, y))
    gpc.load_config({"gradient_accumulation": 4, "torch_compile": {"mode": "reduce-overhead"}})
    try:
        seen: dict[str, Tensor | None] = {}
        plain = torch.optim.SGD(model.parameters(), lr=0.0)
        plain.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
        engine, *_ = colossalai.initialize(model, plain, nn.CrossEntropyLoss(), verbose=False)
        for _ in range(5):
            for part in zip(x.chunk(4), y.chunk(4), strict=True):
                engine.zero_grad()
                engine.backward(engine.criterion(engine(part[0]), part[1]))
                engine.step()
            assert relative_error(seen, reference) <= 1e-6
    finally:
        gpc.destroy()
