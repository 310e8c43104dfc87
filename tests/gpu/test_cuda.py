"""What only a GPU can show. Skipped without one; run before a release.

Tolerances: as in tests/equivalence/test_oracle.py. TF32 is off unless a test says otherwise.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch import tree
from macrobatch.colossalai.trainer.hooks.metric_hook import Metric
from macrobatch.colossalai.utils import MultiTimer
from macrobatch.testing.models import CASES, Case
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_SAMPLES = 29
SIZES = [7, 7, 7, 7, 1]


def build(kind: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(11)
    case = CASES[kind](NUM_SAMPLES)
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
    return Case(case.model.to("cuda", dtype), batch, case.loss_fn)  # the batch stays on the host


def reference_of(case: Case) -> dict[str, Tensor | None]:
    on_host = full_batch_gradient(copy.deepcopy(case.model).cpu(), case.loss_fn, case.batch)
    return {name: None if gradient is None else gradient.cuda() for name, gradient in on_host.items()}


def window_gradient(case: Case, sizes: list[int], **options: Any) -> dict[str, Tensor | None]:
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(case.model)))
    step = mb.TrainStep(case.model, optimizer, case.loss_fn, micro_batch=1, **options)
    assert step.window(tree.split(case.batch, sizes)).skipped is None
    return seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_window_on_cuda_equals_full_batch_on_host(kind, dtype, tolerance):
    case = build(kind, dtype)
    assert relative_error(window_gradient(case, SIZES), reference_of(case)) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "fp32"),
        (torch.float32, "bf16"),
        (torch.float32, "fp16"),
    ],
    ids=["bf16-parameters", "bf16-autocast", "fp16-scaler"],
)
@pytest.mark.parametrize("kind", CASES)
def test_window_in_16_bits_on_cuda_no_worse_than_full_batch(kind, dtype, precision):
    case = build(kind, dtype)
    reference = reference_of(case)
    if precision == "fp16":  # torch's initial scale is meant to overflow a few times; here every window counts
        precision = mb.Fp16("cuda", torch.amp.GradScaler("cuda", init_scale=2.0**8))
    yardstick = relative_error(window_gradient(case, [NUM_SAMPLES], precision=precision), reference)
    error = relative_error(window_gradient(case, SIZES, precision=precision), reference)
    assert error <= 2 * yardstick  # one draw scatters around the promised 1.1 ×, see the oracle on the host


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        b, t, c = x_BTC.shape
        q, k, v = self.qkv(self.norm(x_BTC)).view(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        return x_BTC + self.out(F.gelu(attended))


class GPT(nn.Module):
    """A small causal language model; returns the mean loss over tokens, all rows being of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.blocks = nn.Sequential(Block(64), Block(64))
        self.head = nn.Linear(64, 256)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits_BTV = self.head(self.blocks(self.embed(ids_BT[:, :-1])))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def gpt_loss(model: Any, ids_BT: Tensor) -> Tensor:
    return model(ids_BT)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_model_accumulates_into_persistent_views(mode, dtype):
    """With `.grad` None between windows, reduce-overhead raises or sums wrongly (pytorch issue 169545)."""
    torch.manual_seed(0)
    model, ids_BT = GPT().to("cuda", dtype), torch.randint(0, 256, (16, 33), device="cuda")
    reference = {
        name: None if gradient is None else gradient.cuda()
        for name, gradient in full_batch_gradient(copy.deepcopy(model).cpu(), gpt_loss, ids_BT.cpu()).items()
    }
    eager = relative_error(window_gradient(Case(copy.deepcopy(model), ids_BT, gpt_loss), [2] * 8), reference)
    compiled = torch.compile(model, mode=mode)

    def loss_fn(_: nn.Module, rows_BT: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(rows_BT).clone()  # the graph's own output is overwritten by its next replay

    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=2)
    for _ in range(4):  # the first windows warm up, the later ones replay
        result = step(ids_BT)
        assert relative_error(gradients_of(model), reference) <= 1.1 * eager + 1e-6
        assert result.loss == pytest.approx(
            float(gpt_loss(model, ids_BT).detach()), rel=2e-2 if dtype is torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_unread_never_waits_for_the_device(precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> mb.Loss:
        return mb.cross_entropy(model(batch[0]), batch[1])  # its weight is a tensor on the device

    step = mb.TrainStep(
        model, optimizer, loss_fn, micro_batch=4, clip_norm=1.0, precision=precision, nonfinite="ignore"
    )
    batch = (torch.randn(30, 8).pin_memory(), torch.randint(0, 4, (30,)).pin_memory())
    step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(batch)
        with pytest.raises(RuntimeError):  # control: looking at a number does wait, and the debug mode notices
            _ = result.loss
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_step_checked_waits_only_after_the_last_backward():
    torch.manual_seed(0)
    model = nn.Linear(8, 4).cuda()
    batch = (torch.randn(12, 8, device="cuda"), torch.randint(0, 4, (12,), device="cuda"))

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> mb.Loss:
        return mb.cross_entropy(model(batch[0]), batch[1])

    def relax(event: mb.MicroBatchDone) -> None:
        if event.is_last:
            torch.cuda.set_sync_debug_mode("default")

    step = mb.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn,
        micro_batch=4,
        listeners=[mb.on(mb.MicroBatchDone, relax)],
    )
    step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert step(batch).skipped is None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stopwatch_does_not_wait_until_it_is_read():
    timer = MultiTimer()
    timer.start("step")
    torch.cuda._sleep(10**9)  # cycles: about half a second
    end = torch.cuda.Event()
    end.record()
    timer.stop("step", keep_in_history=True)
    assert not end.query()
    (seconds,) = timer.get_timer("step").get_history()
    assert end.query()
    assert seconds > 0.1


def test_metrics_of_a_trainer_do_not_wait_until_they_are_read():
    metric, total = Metric(), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.add(total, 3)
        metric.add(total, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.get_accumulated_value() == 0.5


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_adamw_on_bf16_parameters_gets_the_fp32_sum_rounded_once(options):
    torch.manual_seed(0)
    model = GPT().to("cuda", torch.bfloat16)
    ids_BT = torch.randint(0, 256, (64, 17), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2, **options)
    step = mb.TrainStep(model, optimizer, gpt_loss, micro_batch=1)
    step(ids_BT)
    for param, exact in zip(twin.parameters(), model.parameters(), strict=True):
        assert exact.grad is not None
        assert exact.grad.dtype is torch.float32
        param.grad = exact.grad.to(torch.bfloat16)
    other.step()
    for param, exact in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(param, exact)


def test_overflow_on_cuda_skips_update_and_scheduler():
    model = nn.Linear(4, 1).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = copy.deepcopy(model.state_dict())
    step = mb.TrainStep(
        model,
        optimizer,
        lambda model, x: model(x).square().mean(),
        micro_batch=2,
        scheduler=scheduler,
        precision=mb.Fp16("cuda", scaler),
    )
    result = step(torch.ones(4, 4))
    assert result.skipped == "overflow"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scaler.get_scale() == 2.0**39


def test_failed_window_on_cuda_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    step = mb.TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=4)
    step(torch.randn(8, 4))
    state, rng = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state()
    poisoned = torch.randn(8, 4)
    poisoned[6] = torch.nan
    with pytest.raises(mb.errors.NonFiniteError, match="micro-batch 1"):
        step(poisoned)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.cuda.get_rng_state())
    assert step.num_updates == 1


def test_two_pass_on_cuda_with_dropout_equals_full_batch():
    """Dropout draws by position on a GPU, so the whole batch is one micro-batch here; the replay must draw the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 4)).cuda().double()
    x_BC = torch.randn(12, 8, device="cuda", dtype=torch.float64)

    def encode(model: Any, batch: Tensor) -> Tensor:
        return F.normalize(model(batch), dim=1)

    def loss(r_BC: Tensor) -> Tensor:
        return F.cross_entropy(r_BC @ r_BC.T / 0.1, torch.arange(len(r_BC), device=r_BC.device))

    torch.cuda.manual_seed(3)
    loss(encode(model, x_BC)).backward()
    reference = gradients_of(model)
    torch.cuda.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mb.accumulate(model, mb.TwoPass(encode, loss), x_BC, micro_batch=12)
    assert relative_error(gradients_of(model), reference) < 1e-12  # float64
