"""Weight gradients that the matrix products add to the fp32 buffer themselves, and embeddings row by row.

Tolerances: products of bf16 numbers are exact in fp32, so sums of a few thousand of them differ from float64 by fp32
rounding alone, 1e-6 relative, where the incoming gradients are the same; a bf16 gradient is off by 2^-9.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch.core.fused import FusedLinear, add_product, add_rows
from macrobatch.core.gradients import GradientBuffer
from macrobatch.errors import ArgumentError, LossError, NonFiniteError
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

pytestmark = pytest.mark.xdist_group("compile")  # in one worker, which alone imports and warms up the compiler

BF16 = torch.bfloat16


class Tied(nn.Module):
    """A head that shares its weight with the embedding, a layer that is used twice, one frozen, one left unused."""

    def __init__(self, *, uses_checkpoint: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.twice = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)
        self.uses_checkpoint = uses_checkpoint

    def body(self, x: Tensor) -> Tensor:
        return self.frozen(torch.tanh(self.twice(torch.tanh(self.twice(x)))))

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT[:, :-1])
        x = checkpoint(self.body, x, use_reentrant=False) if self.uses_checkpoint else self.body(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def loss_fn(model: Any, ids_BT: Tensor) -> Tensor:
    return model(ids_BT)


def tied(seed: int = 0, **options: Any) -> tuple[Tied, Tensor]:
    torch.manual_seed(seed)
    return Tied(**options).to(BF16), torch.randint(0, 11, (24, 7))


def window(model: nn.Module, batch: Any, *, micro_batch: int = 3, loss: Any = loss_fn, **options: Any) -> dict:
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
    step = mb.TrainStep(model, optimizer, loss, micro_batch=micro_batch, **options)
    assert step(batch).skipped is None
    return seen


def num_products(model: nn.Module, batch: Any, **options: Any) -> tuple[dict, int]:
    """The window's gradient and how many matrix products went straight into the buffer."""
    from unittest.mock import patch  # counts, and calls what it counts

    from macrobatch.core import fused

    with patch.object(fused, "_add_product", wraps=fused._add_product) as counted:
        return window(model, batch, **options), counted.call_count


@pytest.mark.parametrize("num", [1, 8, 64])
def test_linear_of_known_gradients_equals_fp64_where_a_bf16_buffer_does_not(num):
    """loss = sum of outputs × constants: the gradient is a product of bf16 numbers (256 being a power of two), and any
    error is accumulation's."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8, bias=False, dtype=BF16)
    x_BI, c_BO = torch.randn(256, 16, dtype=BF16), torch.randn(256, 8, dtype=BF16)

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> mb.Loss:
        return mb.Loss((model(batch[0]) * batch[1]).float().sum(), 1.0 * len(batch[0]))

    def scaled(grad: Tensor) -> dict[str, Tensor | None]:
        return {"weight": grad}

    exact = scaled(c_BO.double().T @ x_BI.double() / 256)
    fused = window(copy.deepcopy(layer), (x_BI, c_BO), micro_batch=256 // num, loss=loss, fused_linear=True)
    assert relative_error(fused, exact) <= 1e-6
    in_bf16 = torch.zeros(8, 16, dtype=BF16)  # control
    for x, c in zip(x_BI.chunk(num), c_BO.chunk(num), strict=True):
        in_bf16 += (c.T @ x) / 256
    assert relative_error(scaled(in_bf16.float()), exact) > 1e-4


@pytest.mark.parametrize("uses_checkpoint", [False, True])
@pytest.mark.parametrize("micro_batch", [24, 5])
def test_tied_frozen_unused_and_repeated_weights(micro_batch, uses_checkpoint):
    model, ids_BT = tied(uses_checkpoint=uses_checkpoint)
    exact = full_batch_gradient(copy.deepcopy(model), loss_fn, ids_BT)
    plain = window(copy.deepcopy(model), ids_BT, micro_batch=micro_batch)
    fused, num = num_products(model, ids_BT, micro_batch=micro_batch, fused_linear=True)
    assert num == -(-24 // micro_batch) * 3  # the repeated layer, twice, and the head
    assert {name for name, grad in fused.items() if grad is None} == {"unused.weight", "unused.bias"}
    assert relative_error(fused, exact) <= 1.1 * relative_error(plain, exact)  # one rounding less
    # The head's part and the embedding's are both in: without either it would be off by much more than bf16.
    assert relative_error(fused, exact) < 2e-2
    assert relative_error({"embed.weight": fused["embed.weight"]}, {"embed.weight": exact["embed.weight"]}) < 2e-2


def looked_up(padding_idx: int | None, dtype: torch.dtype, **options: Any) -> tuple[nn.Embedding, Any, Any]:
    """An embedding, a loss that is linear in it, and a batch with many repeated ids."""
    torch.manual_seed(0)
    layer = nn.Embedding(7, 4, padding_idx=padding_idx, dtype=dtype, **options)
    batch = (torch.randint(0, 7, (64, 5)), torch.randn(64, 5, 4).to(BF16))

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> mb.Loss:
        return mb.Loss((model(batch[0]) * batch[1]).float().sum(), 1.0 * len(batch[0]))

    return layer, loss, batch


def num_rows_added(model: nn.Module, batch: Any, **options: Any) -> tuple[dict, int]:
    from unittest.mock import patch  # counts, and calls what it counts

    from macrobatch.core import fused

    with patch.object(fused, "_add_rows", wraps=fused._add_rows) as counted:
        return window(model, batch, **options), counted.call_count


@pytest.mark.parametrize("capture", [None, "compile"])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own
def test_rows_of_an_embedding_are_added_in_fp32(dtype, padding_idx, capture):
    """What comes in holds in bf16, so any error is accumulation's: fp32's, where rounding each micro-batch to bf16 is
    off by 2^-9."""
    layer, loss, batch = looked_up(padding_idx, dtype)
    exact = full_batch_gradient(copy.deepcopy(layer), loss, batch)
    torch._dynamo.reset()
    settings = {"micro_batch": 16, "loss": loss}
    plain = window(copy.deepcopy(layer), batch, **settings)
    fused, num = num_rows_added(layer, batch, fused_linear=True, capture=capture, **settings)
    assert num == 4
    assert relative_error(fused, exact) <= 1e-6
    if dtype is BF16:
        assert relative_error(plain, exact) > 1e-4  # the control
    if padding_idx is not None:
        assert not fused["weight"][padding_idx].any()


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str)
def test_embeddings_with_a_way_of_their_own_are_left_as_they_are(options):
    layer, loss, batch = looked_up(None, BF16, **options)
    settings = {"micro_batch": 16, "loss": loss}
    plain = window(copy.deepcopy(layer), batch, **settings)
    fused, num = num_rows_added(layer, batch, fused_linear=True, **settings)
    assert num == 0
    assert relative_error(fused, plain) < 1e-2


def test_a_gradient_of_an_embedding_within_the_loss_is_not_added():
    """torch.autograd.grad, with and without a graph, sees a dense gradient, and leaves the buffer alone."""
    layer, _, (ids, slopes) = looked_up(2, BF16)

    def penalty(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        (dense,) = torch.autograd.grad((model(batch[0]) * batch[1]).float().sum(), model.weight)
        graphed = torch.autograd.grad(model(batch[0]).float().square().sum(), model.weight, create_graph=True)
        return (
            (model(batch[0]) * batch[1]).float().mean() + 1e-3 * dense.float().mean() + 1e-3 * graphed[0].float().mean()
        )

    settings = {"micro_batch": 16, "loss": penalty}
    plain = window(copy.deepcopy(layer), (ids, slopes), **settings)
    fused, num = num_rows_added(layer, (ids, slopes), fused_linear=True, **settings)
    assert num == 8  # each micro-batch's own lookup, and the one that the second derivative goes through
    assert relative_error(fused, plain) < 1e-2


def test_forward_is_put_back_also_after_an_error():
    model, ids_BT = tied()
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, micro_batch=8, fused_linear=True)
    step(ids_BT)
    assert not any("forward" in module.__dict__ for module in model.modules())
    step._step.loss_fn = lambda model, batch: model(batch) / 0 if model(batch) is None else 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(ids_BT)
    assert not any("forward" in module.__dict__ for module in model.modules())


def parametrized(model: Tied) -> None:
    nn.utils.parametrizations.weight_norm(model.twice)


def hooked(model: Tied) -> None:
    model.twice.weight.register_hook(lambda grad: grad)


def told(model: Tied) -> None:
    model.twice.weight.register_post_accumulate_grad_hook(lambda param: None)


def forwarded(model: Tied) -> None:
    model.twice.forward = lambda x: F.linear(x, model.twice.weight, model.twice.bias)  # pyright: ignore[reportAttributeAccessIssue]


def half(model: Tied) -> None:
    model.twice.float()
    model.twice.forward = lambda x: F.linear(x.float(), model.twice.weight, model.twice.bias).to(BF16)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("change", [parametrized, hooked, told, forwarded, half])
def test_layers_that_cannot_be_fused_are_left_as_they_are(change):
    model, ids_BT = tied()
    change(model)
    plain = window(model, ids_BT)
    fused, num = num_products(model, ids_BT, fused_linear=True)
    assert num == 8  # the head alone
    assert relative_error(fused, plain) < 1e-2


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        (nn.Embedding(7, 4), "scale_grad_by_freq", True),
        (nn.Embedding(7, 4), "max_norm", 0.5),
        (nn.Embedding(7, 4), "padding_idx", -1),
        (nn.Linear(5, 4, dtype=BF16), "__class__", Doubled),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_that_change_between_windows_are_seen(layer, name, value):
    torch.manual_seed(0)
    batch = torch.randint(0, 7, (9, 5)) if isinstance(layer, nn.Embedding) else torch.randn(9, 5, dtype=BF16)
    found = {}
    for fused in (False, True):
        seen: dict[str, Tensor | None] = {}
        twin = copy.deepcopy(layer)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_, m=twin, s=seen: s.update(gradients_of(m)))
        step = mb.TrainStep(
            twin, optimizer, lambda m, x: m(x).float().square().mean(), micro_batch=9, fused_linear=fused
        )
        step(batch)
        before = dict(seen)
        setattr(twin, name, value)
        step(batch)
        found[fused] = dict(seen)
        assert relative_error(seen, before) > 1e-2  # the control: it matters
    assert relative_error(found[True], found[False]) < 1e-2  # bf16


class Cut(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_does_not_arrive_is_none(fused):
    """A zero would let weight decay move the weight."""
    layers = nn.ModuleDict({"embed": nn.Embedding(7, 4), "cut": nn.Linear(4, 4), "head": nn.Linear(4, 2)}).to(BF16)

    def loss(layers: Any, ids: Tensor) -> Tensor:
        x = layers["embed"](ids)
        return (layers["head"](torch.ones_like(x)).sum() + Cut.apply(layers["cut"](x)).sum()).float()

    seen = window(layers, torch.randint(0, 7, (9, 5)), loss=loss, fused_linear=fused)
    assert {name for name, gradient in seen.items() if gradient is None} == {"embed.weight", "cut.weight", "cut.bias"}


def test_a_hook_set_within_the_loss_is_called():
    def loss(layer: Any, x: Tensor) -> Tensor:
        handle = layer.weight.register_hook(torch.zeros_like)
        try:
            return layer(x).float().mean()
        finally:
            handles.append(handle)

    handles: list[Any] = []
    seen = window(
        nn.Linear(4, 2, dtype=BF16), torch.ones(6, 4, dtype=BF16), micro_batch=6, loss=loss, fused_linear=True
    )
    assert not seen["weight"].any()
    assert seen["bias"].any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_layers_without_outputs(kind):
    layers = nn.ModuleList([kind(4, 0), nn.Linear(1, 1)]).to(BF16)
    batch = torch.zeros(6, dtype=torch.int64) if kind is nn.Embedding else torch.ones(6, 4, dtype=BF16)

    def loss(layers: Any, batch: Tensor) -> Tensor:
        return layers[0](batch).float().sum() + layers[1](torch.ones(1, 1, dtype=BF16)).float().sum()

    assert window(layers, batch, loss=loss, fused_linear=True)["1.weight"].item() == 1


def test_inputs_by_name_and_forward_mode():
    def loss(layers: Any, ids: Tensor) -> Tensor:
        with forward_ad.dual_level():
            x = layers[0](input=ids)
            y = layers[1](input=forward_ad.make_dual(x, torch.ones_like(x)))
            value, slope = forward_ad.unpack_dual(y)
            return value.float().mean() + slope.float().square().mean()

    layers, ids = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 2)]).to(BF16), torch.randint(0, 5, (9, 3))
    plain = window(copy.deepcopy(layers), ids, loss=loss)
    assert relative_error(window(layers, ids, loss=loss, fused_linear=True), plain) < 1e-2


def test_steps_built_anew_leave_no_buffer_behind():
    layer, x = nn.Linear(8, 8, dtype=BF16), torch.ones(2, 8, dtype=BF16)
    buffers: list[weakref.ref[Tensor]] = []
    for _ in range(4):
        optimizer = torch.optim.SGD(layer.parameters())
        step = mb.TrainStep(layer, optimizer, lambda m, x: m(x).float().mean(), micro_batch=2, fused_linear=True)
        step(x)
        buffers.append(weakref.ref(step.gradients.slots[0].view))
    gc.collect()
    assert [buffer() is not None for buffer in buffers] == [False, False, False, True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own
def test_windows_are_compiled_once(monkeypatch):
    original = torch.compile  # what is counted is traced by Dynamo, whoever makes code of it
    monkeypatch.setattr(torch, "compile", lambda loss_fn, **_: original(loss_fn, dynamic=False, backend="aot_eager"))
    model, ids_BT = tied()
    torch._dynamo.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=8, capture="compile", fused_linear=True)
    for _ in range(2):
        step(ids_BT)
    num = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        model(ids_BT).backward()  # eagerly, between windows
        step(ids_BT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num


def test_fp32_weights_are_left_as_they_are():
    model, ids_BT = tied()
    plain = window(model.float(), ids_BT)
    fused, num = num_products(model, ids_BT, fused_linear=True)
    assert num == 0
    # To the bit, but for what the embedding adds, row by row and not as a whole: fp32 rounding.
    shared = "embed.weight"
    assert all(torch.equal(plain[name], grad) for name, grad in fused.items() if grad is not None and name != shared)
    assert relative_error({shared: fused[shared]}, {shared: plain[shared]}) < 1e-6


@pytest.mark.parametrize(("precision", "num"), [("bf16", 24), ("fp32", 24)])
def test_autocast_to_the_weights_dtype_is_fused(precision, num):
    model, ids_BT = tied()
    plain = window(model, ids_BT, precision=precision)
    fused, counted = num_products(model, ids_BT, precision=precision, fused_linear=True)
    assert counted == num
    assert relative_error(fused, plain) < 1e-2


@pytest.mark.parametrize(("capture", "num"), [(None, 24), ("compile", 24)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own
def test_fp32_weights_that_autocast_rounds_are_fused(capture, num):
    """Tied, repeated, frozen and unused ones among them; the plain path rounds each weight gradient to bf16."""
    model, ids_BT = tied()
    torch._dynamo.reset()
    plain = window(model.float(), ids_BT, precision="bf16")
    fused, counted = num_products(model, ids_BT, precision="bf16", capture=capture, fused_linear=True)
    assert counted == num
    assert fused["unused.weight"] is None
    assert relative_error(fused, plain) < 1e-2


def test_autocast_rounds_no_weight_gradient():
    """The products alone, of numbers that bf16 holds: exact but for fp32 sums, where the plain path is bf16."""
    torch.manual_seed(0)
    x_NI, slope_NO = (torch.randn(64, 16).to(BF16).float() for _ in range(2))
    errors = {}
    for fused in (True, False):
        layer = nn.Linear(16, 16)

        def loss(layer: Any, batch: Any) -> mb.Loss:
            x, slope = batch
            return mb.Loss((layer(x).float() * slope).sum(), len(x))

        found = window(layer, (x_NI, slope_NO), loss=loss, precision="bf16", fused_linear=fused, micro_batch=16)
        exact = slope_NO.double().t() @ x_NI.double() / 64  # a power of two scales what comes in without rounding
        errors[fused] = float((found["weight"].double() - exact).norm() / exact.norm())
    assert errors[True] < 1e-6
    assert errors[False] > 1e-4


def test_second_derivatives_reach_weights_that_autocast_rounds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x_BC = torch.randn(12, 4)

    def penalty(model: Any, x_BC: Tensor) -> Tensor:
        x_BC = x_BC.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x_BC).sum(), x_BC, create_graph=True)
        return slope.float().square().mean()

    exact = full_batch_gradient(copy.deepcopy(model), penalty, x_BC)
    fused = window(model, x_BC, loss=penalty, precision="bf16", fused_linear=True)
    assert relative_error(fused, exact) < 3e-2  # bf16 twice through


def test_a_gradient_within_the_loss_is_not_added():
    """torch.autograd.grad to the inputs must leave weights alone, and a gradient penalty needs a second derivative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(BF16)
    x_BC = torch.randn(12, 4, dtype=BF16)

    def penalty(model: Any, x_BC: Tensor) -> Tensor:
        x_BC = x_BC.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x_BC).sum(), x_BC, create_graph=True)
        (unused,) = torch.autograd.grad(model(x_BC).sum(), x_BC)
        (weight,) = torch.autograd.grad(model(x_BC).sum(), model[0].weight)
        return (model(x_BC) * (1 + unused.sum() + weight.sum())).float().mean() + slope.float().square().mean()

    plain = window(copy.deepcopy(model), x_BC, loss=penalty)
    assert relative_error(window(model, x_BC, loss=penalty, fused_linear=True), plain) < 1e-2  # bf16 each


def test_functional_calls_are_left_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(BF16)
    x_BC = torch.randn(12, 4, dtype=BF16)

    def loss(model: Any, x_BC: Tensor) -> Tensor:
        doubled = {name: 2 * param for name, param in model.named_parameters()}
        slopes = torch.func.grad(lambda x_BC: torch.func.functional_call(model, doubled, x_BC).float().sum())(x_BC)
        return torch.func.functional_call(model, doubled, x_BC).float().mean() + slopes.float().mean()

    fused, num = num_products(model, x_BC, loss=loss, fused_linear=True)
    assert num == 0
    assert relative_error(fused, window(model, x_BC, loss=loss)) == 0.0


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=BF16)
    x = torch.randn(shape, dtype=BF16)
    exact = copy.deepcopy(layer).double()
    exact(x.double()).sum().backward()
    buffer = GradientBuffer(layer.parameters)
    buffer.start()
    with FusedLinear(layer).into(buffer):
        layer(x).sum().backward()
    buffer.collect()
    torch.testing.assert_close(layer.weight.grad, exact.weight.grad, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert all(slot.used for slot in buffer.slots)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own
def test_a_compiled_loss_keeps_it(caplog):
    """The compiled backward writes in place, marks the weights as used, and leaves an unused one alone."""
    model, ids_BT = tied()
    exact = full_batch_gradient(copy.deepcopy(model), loss_fn, ids_BT)
    torch._dynamo.reset()
    with caplog.at_level("WARNING", "macrobatch"):
        fused, num = num_products(model, ids_BT, micro_batch=8, capture="compile", fused_linear=True)
    assert num == 3 * 3  # by the operator, within what was compiled
    assert not caplog.records
    assert not torch._dynamo.utils.counters["graph_break"]
    assert fused["unused.weight"] is None
    assert relative_error(fused, exact) < 2e-2


class Casts(TorchDispatchMode):
    """Shapes of the 16-bit tensors that are copied to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_to_copy" and (kwargs or {}).get("dtype") is torch.float32:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
def test_what_autograd_adds_is_not_copied_to_fp32_first(fused):
    model, ids_BT = tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=8, fused_linear=fused)
    step(ids_BT)
    with Casts() as casts:
        step(ids_BT)
    bias = tuple(model.twice.bias.shape)
    assert (bias in casts.shapes) == (not fused)  # the control: autograd as it is copies


def test_gradients_have_the_parameters_dtype_again_when_released():
    model, ids_BT = tied()
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, micro_batch=8, fused_linear=True)
    step(ids_BT)
    step.gradients.release()
    model(ids_BT).backward()
    assert {param.grad.dtype for param in model.parameters() if param.grad is not None} == {BF16}


def test_operator_passes_the_checks_of_torch():
    total, grad, x = torch.randn(3, 4), torch.randn(5, 3, dtype=BF16), torch.randn(5, 4, dtype=BF16)
    torch.library.opcheck(add_product, (total, grad, x))
    torch.library.opcheck(add_rows, (total, torch.tensor([2, 0, 2]), torch.randn(3, 4, dtype=BF16), 0))


def test_flag_is_checked():
    model, _ = tied()
    with pytest.raises(ArgumentError, match="fused_linear"):
        mb.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, micro_batch=1, fused_linear="yes")  # pyright: ignore[reportArgumentType]


class Rounds(TorchDispatchMode):
    """How many tensors of one shape are made in bf16 from others."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_to_copy" and (kwargs or {}).get("dtype") is BF16:
            self.num += tuple(args[0].shape) == self.shape
        elif name == "_foreach_copy_":
            self.num += sum(tuple(tensor.shape) == self.shape for tensor in args[0])
        return func(*args, **(kwargs or {}))


class UnknownAutocast(mb.Bf16):
    """Autocast that the step does not know of, so that every forward rounds the weights for itself."""

    autocast = None

    def forward(self) -> Any:
        return torch.autocast("cpu", BF16)


def perceptron(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), torch.randn(24, 6)


def squared(model: Any, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


@pytest.mark.parametrize(("precision", "num"), [("bf16", 1), (UnknownAutocast("cpu"), 6)], ids=["known", "unknown"])
def test_weights_are_rounded_once_a_window(precision, num):
    model, x = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, squared, micro_batch=4, precision=precision, fused_linear=True)
    for _ in range(2):  # these check
        step(x)
    with Rounds((40, 6)) as rounds:
        step(x)
    assert rounds.num == num


@pytest.mark.parametrize("capture", [None, "compile"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own
def test_weights_rounded_once_are_those_that_every_forward_would_round(capture):
    """To the bit over several updates, but for a bias, whose gradient is summed in fp32 and not rounded to bf16."""
    found = {}
    for precision in ("bf16", UnknownAutocast("cpu")):
        torch._dynamo.reset()
        model, x = perceptron()
        for layer in (model[0], model[2]):
            layer.bias.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        step = mb.TrainStep(
            model, optimizer, squared, micro_batch=4, precision=precision, capture=capture, fused_linear=True
        )
        for _ in range(4):
            step(x)
        found[str(precision)] = [param.detach().clone() for param in model.parameters()]
    moved = perceptron()[0].state_dict()
    first, second = found.values()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0], moved["0.weight"], atol=1e-3)  # the control: there was something to round anew


def test_a_bias_that_autocast_rounds_gets_a_sum_in_fp32():
    torch.manual_seed(0)
    slope_NO = torch.randn(64, 16).to(BF16).float()
    errors = {}
    for fused in (True, False):

        def loss(layer: Any, batch: Any) -> mb.Loss:
            x, slope = batch
            return mb.Loss((layer(x).float() * slope).sum(), len(x))

        found = window(
            nn.Linear(16, 16), (torch.randn(64, 16), slope_NO), loss=loss, precision="bf16", fused_linear=fused,
            micro_batch=16,
        )  # fmt: skip
        exact = slope_NO.double().sum(0) / 64  # a power of two
        errors[fused] = float((found["bias"].double() - exact).norm() / exact.norm())
    assert errors[True] < 1e-6
    assert errors[False] > 1e-4


class Normalizing(nn.Module):
    """Rows of length one, as heads for recognizing faces keep them, by its own forward."""

    def __init__(self, *, begins: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        if not begins:
            self.layer.weight.data = F.normalize(self.layer.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data = F.normalize(self.layer.weight.data)
        return self.layer(x)


@pytest.mark.parametrize("begins", [True, False])
def test_a_forward_that_changes_weights_is_refused(begins):
    """In the first window, or, if only the first update gives it something to do, in the second."""
    torch.manual_seed(0)
    model, x = Normalizing(begins=begins), torch.randn(12, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = mb.TrainStep(model, optimizer, squared, micro_batch=4, precision="bf16", fused_linear=True)
    if not begins:
        step(x)
    bias = model.layer.bias.detach().clone()
    with pytest.raises(LossError, match="changes the weights"):
        step(x)
    assert torch.equal(model.layer.bias, bias)
    assert step.num_updates == (not begins)
    plain = mb.TrainStep(model, optimizer, squared, micro_batch=4, precision="bf16")
    plain(x)


def test_weights_that_are_not_numbers_are_no_change():
    model, x = perceptron()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = mb.TrainStep(model, optimizer, squared, micro_batch=4, precision="bf16", fused_linear=True)
    with pytest.raises(NonFiniteError):
        step(x)


def test_a_bias_and_a_weight_that_are_exchanged_between_windows():
    """A bias by another parameter, the numbers of a weight by others elsewhere, and by those of another shape."""
    model, x = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, squared, micro_batch=4, precision="bf16", fused_linear=True)
    for change in (None, "bias", "numbers", "shape"):
        if change == "bias":
            model[2].bias = nn.Parameter(model[2].bias.detach() + 3)
            model[2].bias.requires_grad_(False)
        if change == "numbers":
            model[2].weight.data = model[2].weight.data.mul(2)
        if change == "shape":
            model[0].weight.data = torch.randn(40, 2)
            x = x[:, :2].contiguous()
        with torch.no_grad(), torch.autocast("cpu", BF16):
            exact = squared(copy.deepcopy(model), x)
        result = step(x)
        assert result.loss == pytest.approx(float(exact), rel=1e-2)  # bf16 in other batches; a stale part: > 0.1
