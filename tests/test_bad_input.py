"""Bad input is refused: by the right class, with what was given, what was expected and what to do, and without a trace.

Nothing may have moved afterwards: no parameter, optimizer, scheduler, module buffer, generator or counter.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

import macrobatch as mb
from macrobatch.errors import (
    ArgumentError,
    BatchError,
    GradientError,
    LossError,
    MacrobatchError,
    NonFiniteError,
    StateError,
)
from macrobatch.plan.lengths import LengthCost

NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """Everything that a forward can move besides gradients: dropout draws, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def classes(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def samples(num_samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_samples)  # the default one's state is compared
    return torch.randn(num_samples, 6, generator=generator), torch.randint(0, 3, (num_samples,), generator=generator)


class Setup(NamedTuple):
    """A run that has made an update, so that there is state to lose."""

    model: Net
    optimizer: AdamW
    scheduler: CosineAnnealingLR
    step: mb.TrainStep
    loss_fn: list[Callable[[Any, Any], Any]]
    """The one at index 0 is called; put another there."""


def started(**options: Any) -> Setup:
    torch.manual_seed(0)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, 10)
    loss_fn: list[Callable[[Any, Any], Any]] = [classes]
    count = options.pop("count", None)
    step = mb.TrainStep(
        model,
        optimizer,
        lambda model, batch: loss_fn[0](model, batch),
        **{"micro_batch": 3, "scheduler": scheduler, **options},
    )
    step(samples())
    step._count = count  # from here on: the first update needs none
    return Setup(model, optimizer, scheduler, step, loss_fn)


def trace(model: nn.Module, optimizer: Any = None, scheduler: Any = None, step: mb.TrainStep | None = None) -> Any:
    """Copies of everything that a refused call has to leave alone."""
    return copy.deepcopy(
        {
            "model": dict(model.state_dict()),
            "modes": [module.training for module in model.modules()],
            "trained": [param.requires_grad for param in model.parameters()],
            "optimizer": optimizer.state_dict() if optimizer else None,
            "scheduler": scheduler.state_dict() if scheduler else None,
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False)["state"]["key"],
            "counters": (step.num_updates, step.num_skipped) if step else None,
            "precision": step.state_dict()["precision"] if step else None,
        }
    )


def equal(one: Any, other: Any) -> bool:
    """To the bit, NaN like NaN, through any containers."""
    if isinstance(one, Tensor | np.ndarray):
        a, b = (
            np.asarray(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x) for x in (one, other)
        )
        return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or one is other


@contextmanager
def assert_unchanged(model: nn.Module, *rest: Any) -> Generator[None]:
    """Nothing has moved when the block is left."""
    before = trace(model, *rest)
    yield
    changed = [name for name, value in trace(model, *rest).items() if not equal(value, before[name])]
    assert not changed, f"changed: {changed}"


@contextmanager
def refused(kind: type[MacrobatchError], *given: str) -> Generator[None]:
    """The block raises exactly this class, and its message has all three parts."""
    with pytest.raises(MacrobatchError) as caught:
        yield
    error = caught.value
    assert type(error) is kind
    for part in ("given ", "expected ", "To fix it, ", *given):
        assert part in str(error), str(error)
    assert error.what
    assert error.expected
    assert error.fix


@contextmanager
def refused_call(setup: Setup, kind: type[MacrobatchError], *given: str) -> Generator[None]:
    """A call is refused, nothing has changed, and the next call with good input works."""
    with assert_unchanged(setup.model, setup.optimizer, setup.scheduler, setup.step), refused(kind, *given):
        yield
    setup.loss_fn[0], setup.step._count = classes, None
    assert setup.step(samples()).skipped is None
    assert setup.step.num_updates == 2


# --- arguments ---

NOT_COUNTS = [0, -1, 2.5, True, NAN, "4", None, [4], torch.tensor(4)]
NOT_LIMITS = [0, -1.0, True, NAN, INF, "1", torch.tensor(1.0), [1.0]]

ARGUMENTS: list[tuple[str, Any]] = [
    *(("micro_batch", value) for value in (*NOT_COUNTS, "Auto")),
    *(("clip_norm", value) for value in NOT_LIMITS),
    *(("clip_value", value) for value in NOT_LIMITS),
    *(("normalize", value) for value in ("mean", "Exact", None, 4, mb.Constant)),
    *(("precision", value) for value in ("fp64", "float16", torch.float16, None, 16, mb.Bf16)),
    *(("nonfinite", value) for value in ("warn", None, True, "Raise")),
    *(("sparse_grad", value) for value in ("allow", None, True)),
    *(("count", value) for value in (4, "tokens", {"loss": 4})),
    *(("listeners", value) for value in (None, print, 3, [3], [None], "print")),
    *(("scheduler", value) for value in ("cosine", 3, StepLR, [None], [lambda: None])),
]


@pytest.mark.parametrize(("name", "value"), ARGUMENTS, ids=lambda value: str(value).split(" at 0x")[0][:40])
def test_train_step_argument_out_of_domain_is_refused(name, value):
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    shown = [repr(value)] if isinstance(value, str) and name != "scheduler" else []  # "4" is not to look like 4
    with assert_unchanged(model, optimizer), refused(ArgumentError, name, *shown):
        mb.TrainStep(model, optimizer, classes, **{"micro_batch": 3, name: value})


@pytest.mark.parametrize("value", NOT_COUNTS, ids=str)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (mb.Constant, "Constant"),
        (mb.Rows, "micro_batch"),
        (lambda n: mb.Tokens(n, lengths=lambda batch: [1] * 8), "max_tokens"),
    ],
    ids=["Constant", "Rows", "Tokens"],
)
def test_option_that_is_no_count_is_refused(make, name, value):
    with refused(ArgumentError, name, f"given {value!r}"):
        make(value)


@pytest.mark.parametrize("model", [None, classes, Net, "net", {}], ids=lambda value: str(value)[:20])
def test_model_that_is_no_module_is_refused(model):
    with refused(ArgumentError, "model"):
        mb.TrainStep(model, SGD(Net().parameters(), lr=0.1), classes, micro_batch=3)


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(), "mse", 3], ids=str)
def test_loss_fn_that_is_no_function_of_model_and_batch_is_refused(loss_fn):
    model = Net()
    with refused(ArgumentError, "loss_fn"):
        mb.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=3)
    with refused(ArgumentError, "loss_fn"):
        mb.accumulate(model, loss_fn, samples(), micro_batch=3)


@pytest.mark.parametrize(("encode", "loss"), [(None, classes), (classes, 3)], ids=["encode", "loss"])
def test_two_pass_of_what_is_no_function_is_refused(encode, loss):
    with refused(ArgumentError, "TwoPass"):
        mb.TwoPass(encode, loss)


def frozen(model: Net) -> SGD:
    model.requires_grad_(False)
    return SGD(model.parameters(), lr=0.1)


BAD_OPTIMIZERS: dict[str, Callable[[Net], Any]] = {
    "None": lambda model: None,
    "parameters": lambda model: list(model.parameters()),
    "class": lambda model: SGD,
    "no optimizer": lambda model: [],
    "scheduler": lambda model: StepLR(SGD(model.parameters(), lr=0.1), 1),
    "one of two": lambda model: [SGD(model.parameters(), lr=0.1), None],
    "no parameters": lambda model: SGD([{"params": []}], lr=0.1),
    "all frozen": frozen,
    "two of the same": lambda model: [SGD(model.parameters(), lr=0.1)] * 2,
    "one parameter in two": lambda model: [
        SGD(model.parameters(), lr=0.1),
        SGD([next(model.parameters())], lr=0.1),
    ],
}


@pytest.mark.parametrize("name", BAD_OPTIMIZERS)
def test_optimizer_that_cannot_train_the_model_is_refused(name):
    model = Net()
    optimizer = BAD_OPTIMIZERS[name](model)
    with assert_unchanged(model), refused(ArgumentError, "optimizer"):
        mb.TrainStep(model, optimizer, classes, micro_batch=3)


def test_optimizer_of_another_model_is_refused():
    """The classic: the optimizer was built before the model was copied. Every update would be an update of nothing."""
    model, copied = Net(), Net()
    optimizer = SGD(copied.parameters(), lr=0.1)
    with assert_unchanged(model, optimizer), refused(ArgumentError, "optimizer"):
        mb.TrainStep(model, optimizer, classes, micro_batch=3)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_loss_of_another_model_is_refused_without_a_trace(nonfinite):
    """A loss_fn that closes over a copy of the model trains nothing; weight decay and momentum must not act either."""
    model, copied = Net(), Net()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    step = mb.TrainStep(model, optimizer, lambda _, b: classes(copied.eval(), b), micro_batch=3, nonfinite=nonfinite)
    with assert_unchanged(model, optimizer, None, step), refused(LossError):
        step(samples())


def test_optimizer_as_scheduler_is_refused():
    """It has a step(), and would be stepped twice."""
    model = Net()
    optimizer: Any = SGD(model.parameters(), lr=0.1)
    with refused(ArgumentError, "scheduler"):
        mb.TrainStep(model, optimizer, classes, micro_batch=3, scheduler=optimizer)


@pytest.mark.parametrize("in_list", [False, True], ids=["alone", "in a list"])
def test_scheduler_that_wants_a_metric_is_refused(in_list):
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer)
    with refused(ArgumentError, "scheduler", "ReduceLROnPlateau", "metric"):
        mb.TrainStep(
            model,
            optimizer,
            classes,
            micro_batch=3,
            scheduler=[StepLR(optimizer, 1), plateau] if in_list else plateau,
        )


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"two": True}], ids=str)
def test_closure_optimizer_that_cannot_replay_is_refused(options):
    model = Net()
    optimizer: Any = torch.optim.LBFGS(model.layers[0].parameters())
    if options.pop("two", False):
        optimizer = [optimizer, SGD(model.layers[4].parameters(), lr=0.1)]
    with refused(ArgumentError, "LBFGS"):
        mb.TrainStep(model, optimizer, classes, micro_batch=3, **options)


def test_sparse_embedding_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 3))
    with refused(GradientError, "'0'", "Embedding", "sparse=True"):
        mb.TrainStep(model, SGD(model.parameters(), lr=0.1), classes, micro_batch=3)


# --- batches ---

BAD_BATCHES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "number": lambda: 5,
    "text": lambda: "text",
    "empty dict": dict,
    "empty list": list,
    "0-d tensor": lambda: torch.tensor(1.0),
    "no rows": lambda: samples(0),
    "no rows in one leaf": lambda: (torch.ones(8, 6), torch.zeros(0, dtype=torch.long)),
    "rows that disagree": lambda: (torch.ones(8, 6), torch.zeros(7, dtype=torch.long)),
    "rows that disagree, nested": lambda: {"x": [torch.ones(8, 6)], "meta": {"ids": ["a"] * 7}},
    "lengths that differ": lambda: [torch.ones(5), torch.ones(7)],
    "iterator": lambda: iter([samples()]),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_step_bad_batch_is_refused_without_a_trace(name):
    setup = started()
    bad = BAD_BATCHES[name]()
    with refused_call(setup, BatchError):
        setup.step(bad)


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_window_bad_micro_batch_is_refused_without_a_trace(name):
    """As the second one: the first has been forward and backward, so that there is something to undo."""
    setup = started()
    micro_batches = [samples(3), BAD_BATCHES[name](), samples(2)]
    with refused_call(setup, BatchError):
        setup.step.window(iter(micro_batches))
    with assert_unchanged(setup.model, setup.optimizer, setup.scheduler, setup.step), refused(BatchError):
        setup.step.window(micro_batches)


@pytest.mark.parametrize(
    "make", [list, tuple, lambda: iter([]), lambda: (x for x in ())], ids=["list", "tuple", "iterator", "generator"]
)
def test_window_without_micro_batches_is_refused_without_a_trace(make):
    setup = started()
    with refused_call(setup, BatchError, "no micro-batches"):
        setup.step.window(make())


@pytest.mark.parametrize("micro_batches", [None, 5], ids=str)
def test_window_of_what_cannot_be_iterated_is_refused_without_a_trace(micro_batches):
    setup = started()
    with refused_call(setup, BatchError):
        setup.step.window(micro_batches)


def test_tokens_row_beyond_the_cap_is_refused_without_a_trace():
    longest = [1]
    setup = started(micro_batch=mb.Tokens(10, lengths=lambda batch: [1] * 7 + longest))
    longest[0] = 11
    with assert_unchanged(setup.model, setup.optimizer, setup.scheduler, setup.step), refused(BatchError, "row 7"):
        setup.step(samples())


# --- losses ---


def logits(model: Any, batch: Any) -> Tensor:
    return model(batch[0])


BAD_LOSSES: dict[str, tuple[type[MacrobatchError], Callable[[Any, Any], Any]]] = {
    "None": (LossError, lambda m, b: None),
    "float": (LossError, lambda m, b: classes(m, b).item()),
    "bool": (LossError, lambda m, b: True),
    "text": (LossError, lambda m, b: "loss"),
    "tuple": (LossError, lambda m, b: (classes(m, b), logits(m, b))),
    "list": (LossError, lambda m, b: [classes(m, b)]),
    "dict of tensors": (LossError, lambda m, b: {"loss": classes(m, b), "logits": logits(m, b)}),
    "dict of a Loss and a tensor": (LossError, lambda m, b: {"a": mb.Loss(classes(m, b), 1), "b": classes(m, b)}),
    "empty dict": (LossError, lambda m, b: {}),
    "a module": (LossError, lambda m, b: m),
    "vector": (LossError, lambda m, b: logits(m, b).mean(1)),
    "one-element vector": (LossError, lambda m, b: classes(m, b)[None]),
    "no grad": (LossError, lambda m, b: classes(m, b).detach()),
    "integer": (LossError, lambda m, b: logits(m, b).argmax(1).sum()),
    "complex": (LossError, lambda m, b: torch.complex(classes(m, b), classes(m, b))),
    "NaN": (NonFiniteError, lambda m, b: classes(m, b) * NAN),
    "infinite": (NonFiniteError, lambda m, b: classes(m, b) * INF),
    "NaN sum": (NonFiniteError, lambda m, b: mb.Loss(classes(m, b) * NAN, 3)),
    "total a float": (LossError, lambda m, b: mb.Loss(cast(Any, 1.0), 3)),
    "total a vector": (LossError, lambda m, b: mb.Loss(logits(m, b).mean(1), 3)),
    "total complex": (LossError, lambda m, b: mb.Loss(torch.complex(classes(m, b), classes(m, b)), 3)),
    "total without grad": (LossError, lambda m, b: mb.Loss(classes(m, b).detach(), 3)),
}

BAD_WEIGHTS: dict[str, Any] = {
    "-1": -1,
    "-0.5": -0.5,
    "NaN": NAN,
    "infinite": INF,
    "bool": True,
    "text": "3",
    "None": None,
    "vector": torch.ones(3),
    "one-element vector": torch.ones(1),
    "list": [3],
    "complex": 3j,
    "complex tensor": torch.tensor(3j),
    "tensor -1": torch.tensor(-1.0),
    "tensor -1 int": torch.tensor(-1),
    "tensor NaN": torch.tensor(NAN),
    "tensor infinite": torch.tensor(INF),
    "integer beyond floats": 10**400,
}


def from_micro_batch(index: int, bad: Callable[[Any, Any], Any], good: Callable[[Any, Any], Any]) -> Any:
    """`bad` for one micro-batch of a window, `good` for the others."""
    num_calls = 0

    def loss_fn(model: Any, batch: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return (bad if num_calls - 1 == index else good)(model, batch)

    return loss_fn


@pytest.mark.parametrize("index", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_loss_is_refused_without_a_trace(name, index):
    setup = started()
    kind, bad = BAD_LOSSES[name]
    setup.loss_fn[0] = from_micro_batch(
        index, bad, lambda m, b: mb.Loss(classes(m, b), 3) if "sum" in name else classes(m, b)
    )
    with refused_call(setup, kind, *([f"micro-batch {index}"] if kind is NonFiniteError else [])):
        setup.step(samples())


@pytest.mark.parametrize("index", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weight_is_refused_without_a_trace(name, index):
    """Among good weights that outweigh it: a sum may be fine where an addend is not."""
    setup = started()
    bad = BAD_WEIGHTS[name]
    setup.loss_fn[0] = from_micro_batch(
        index, lambda m, b: mb.Loss(classes(m, b), bad), lambda m, b: mb.Loss(classes(m, b), torch.tensor(5.0))
    )
    with refused_call(setup, LossError, "weight"):
        setup.step(samples())


@pytest.mark.parametrize("index", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("name", ["NaN", "infinite"])
def test_nonfinite_gradient_of_a_finite_loss_is_refused_without_a_trace(name, index):
    setup = started()

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Tensor:
            return gradients[0] * (NAN if name == "NaN" else INF)

    setup.loss_fn[0] = from_micro_batch(index, lambda m, b: classes(lambda x: Spoil.apply(m(x)), b), classes)
    with refused_call(setup, NonFiniteError, "gradient"):
        setup.step(samples())


def test_terms_that_change_within_a_window_are_refused_without_a_trace():
    setup = started(count=lambda batch: {"a": 8, "b": 8})

    def term(*names: str) -> Callable[[Any, Any], Any]:
        return lambda m, b: {name: mb.Loss(classes(m, b) * len(b[1]), len(b[1])) for name in names}

    setup.loss_fn[0] = from_micro_batch(1, term("a"), term("a", "b"))
    with refused_call(setup, LossError, "'a'", "'b'"):
        setup.step(samples())


def two_terms(model: Any, batch: Any) -> dict[str, mb.Loss]:
    total = classes(model, batch) * len(batch[1])
    return {"a": mb.Loss(total, len(batch[1])), "b": mb.Loss(total, torch.tensor(len(batch[1])))}


BAD_COUNTS: dict[str, Callable[[Any], Any]] = {
    "too many": lambda batch: {"a": 8, "b": 9},
    "too few": lambda batch: {"a": 7, "b": 8},
    "too many, as a tensor": lambda batch: {"a": 8, "b": torch.tensor(9)},
    "zero": lambda batch: {"a": 0, "b": 8},
    "a term missing": lambda batch: {"a": 8},
    "a term too many": lambda batch: {"a": 8, "b": 8, "c": 8},
    "another name": lambda batch: {"a": 8, "B": 8},
    "one number": lambda batch: 8,
    "nothing": lambda batch: None,
    "negative": lambda batch: {"a": 8, "b": -8},
    "NaN": lambda batch: {"a": 8, "b": NAN},
    "bool": lambda batch: {"a": 8, "b": True},
    "text": lambda batch: {"a": 8, "b": "8"},
    "vector": lambda batch: {"a": 8, "b": torch.ones(8)},
    "a list": lambda batch: [8, 8],
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_count_that_lies_is_refused_without_a_trace(name):
    setup = started(count=BAD_COUNTS[name])
    setup.loss_fn[0] = two_terms
    with refused_call(setup, LossError):
        setup.step(samples())


@pytest.mark.parametrize("counted", [7, 9, 0, 1e9, torch.tensor(9)], ids=str)
def test_count_that_lies_about_the_only_term_is_refused_without_a_trace(counted):
    setup = started(count=lambda batch: counted)
    with refused_call(setup, LossError, "8"):
        setup.step(samples())


def test_window_expected_that_lies_is_refused_without_a_trace():
    setup = started()
    with refused_call(setup, LossError, "5"):
        setup.step.window([samples(3), samples(2)], expected=6)


BAD_COUPLED: dict[str, Callable[[Any], Any]] = {
    "vector": lambda r: r.mean(1),
    "float": lambda r: r.detach().mean().item(),
    "no grad": lambda r: r.detach().mean(),
    "None": lambda r: None,
    "complex": lambda r: torch.complex(r.mean(), r.mean()),
    "a Loss": lambda r: mb.Loss(r.mean(), 8),
}


@pytest.mark.parametrize("name", BAD_COUPLED)
def test_bad_two_pass_loss_is_refused_without_a_trace(name):
    setup = started()
    step = mb.TrainStep(setup.model, setup.optimizer, mb.TwoPass(logits, BAD_COUPLED[name]), micro_batch=3)
    with assert_unchanged(setup.model, setup.optimizer, setup.scheduler, step), refused(LossError, "TwoPass.loss"):
        step(samples())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("num_before", [0, 1], ids=["first call", "later call"])
def test_step_where_gradients_are_switched_off_is_refused_and_works_afterwards(guard, num_before):
    torch.manual_seed(0)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    step = mb.TrainStep(model, optimizer, classes, micro_batch=3)
    for _ in range(num_before):
        step(samples())
    with assert_unchanged(model, optimizer, None, step), refused(LossError, "no_grad"), guard():
        step(samples())
    assert step(samples()).skipped is None


# --- accumulate ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["own gradients", "a TrainStep's gradients"])
@pytest.mark.parametrize("name", ["NaN", "vector", "None", "raises"])
def test_accumulate_bad_loss_is_refused_and_gradients_are_as_before(name, trained, dtype):
    torch.manual_seed(0)
    model: Any = Net().to(dtype)
    batch = (torch.randn(8, 6, dtype=dtype), torch.randint(0, 3, (8,)))
    if trained:
        mb.TrainStep(model, SGD(model.parameters(), lr=0.0), classes, micro_batch=3)(batch)
    else:
        classes(model, batch).backward()
    before = [(param.grad, param.grad.clone()) for param in model.parameters()]

    def raises(model: Any, batch: Any) -> Any:
        raise NonFiniteError("it", given="1", expected="2", fix="3")

    kind, bad = BAD_LOSSES.get(name, (NonFiniteError, raises))
    with assert_unchanged(model), refused(kind):
        mb.accumulate(model, from_micro_batch(1, bad, classes), batch, micro_batch=3)
    for param, (gradient, value) in zip(model.parameters(), before, strict=True):
        assert param.grad is gradient
        torch.testing.assert_close(gradient, value, rtol=0, atol=0)


@pytest.mark.parametrize("value", NOT_COUNTS, ids=str)
def test_accumulate_micro_batch_out_of_domain_is_refused(value):
    with refused(ArgumentError, "micro_batch"):
        mb.accumulate(Net(), classes, samples(), micro_batch=value)


@pytest.mark.parametrize("name", ["accumulate", "verify"])
def test_what_is_no_model_or_no_loss_function_is_refused(name):
    with refused(ArgumentError, "nn.Module"):
        getattr(mb, name)(None, classes, samples(), micro_batch=3)
    with refused(ArgumentError, "loss_fn"):
        getattr(mb, name)(Net(), "classes", samples(), micro_batch=3)


def test_accumulate_without_trainable_parameters_is_refused():
    with refused(ArgumentError, "no parameter that requires grad"):
        mb.accumulate(Net().requires_grad_(False), classes, samples(), micro_batch=3)


def test_accumulate_several_terms_is_refused():
    with refused(LossError, "2 terms"):
        mb.accumulate(Net(), two_terms, samples(), micro_batch=3)


# --- saved states ---

WINDOW = {
    "version": 1,
    "size": 3,
    "tail": "apply",
    "is_closed": False,
    "num_pending": 0,
    "num_updates": 7,
    "num_skipped": 0,
    "num_dropped": 0,
}
SCALER = torch.amp.GradScaler("cpu").state_dict()

BAD_STATES: dict[str, Any] = {
    "None": None,
    "number": 5,
    "text": "state",
    "list of keys": ["window", "precision"],
    "empty": {},
    "no window": {"precision": {}},
    "too many keys": {"window": WINDOW, "precision": {}, "model": {}},
    "window None": {"window": None, "precision": {}},
    "window of another version": {"window": {**WINDOW, "version": 2}, "precision": {}},
    "window with a negative counter": {"window": {**WINDOW, "num_updates": -1}, "precision": {}},
    "window with a fractional counter": {"window": {**WINDOW, "num_updates": 1.5}, "precision": {}},
    "window with an unknown key": {"window": {**WINDOW, "extra": 1}, "precision": {}},
    "window of size 0": {"window": {**WINDOW, "size": 0}, "precision": {}},
    "another precision": {"window": WINDOW, "precision": SCALER},
    "precision a number": {"window": WINDOW, "precision": 3},
    "a model's state": nn.Linear(1, 1).state_dict(),
}

BAD_SCALERS: dict[str, Any] = {
    "None": None,
    "empty": {},
    "list": [1],
    "number": 3,
    "a key missing": {name: value for name, value in SCALER.items() if name != "scale"},
    "scale of text": {**SCALER, "scale": "abc"},
    "scale NaN": {**SCALER, "scale": NAN},
    "scale negative": {**SCALER, "scale": -1.0},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_load_state_dict_of_garbage_is_refused_without_a_trace(name):
    setup = started()
    before = setup.step.state_dict()
    with refused_call(setup, StateError):
        setup.step.load_state_dict(BAD_STATES[name])
    assert before["window"]["num_updates"] == 1


@pytest.mark.parametrize("name", BAD_SCALERS)
def test_load_state_dict_of_a_garbage_loss_scale_is_refused_without_a_trace(name):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    setup = started(precision=mb.Fp16("cpu", scaler))
    with refused_call(setup, StateError):
        setup.step.load_state_dict({"window": WINDOW, "precision": BAD_SCALERS[name]})


# --- the tests' own helper ---

CHANGES: dict[str, Callable[[Any], object]] = {
    "model": lambda s: s.model.layers[0].weight.data.add_(1e-6),
    "modes": lambda s: s.model.eval(),
    "trained": lambda s: s.model.requires_grad_(False),
    "optimizer": lambda s: s.optimizer.state[s.model.layers[0].weight]["exp_avg"].add_(1e-6),
    "scheduler": lambda s: (s.optimizer.step(), s.scheduler.step()),
    "torch": lambda s: torch.rand(1),
    "python": lambda s: random.random(),
    "counters": lambda s: s.step(samples()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_assert_unchanged_change_is_noticed(name):
    setup = started()
    with (
        pytest.raises(AssertionError, match=f"changed.*{name}"),
        assert_unchanged(setup.model, setup.optimizer, setup.scheduler, setup.step),
    ):
        CHANGES[name](setup)


def test_step_whose_parameters_moved_is_refused():
    """Its batches would go to the device of old. "meta" stands for the one the model went to."""
    model = torch.nn.Linear(6, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, classes, micro_batch=3)
    step(samples())
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(param.to("meta")) for param in model.parameters()]
    with pytest.raises(ArgumentError, match="parameters on meta, of a step that was built for cpu"):
        step(samples())


@pytest.mark.parametrize("value", [1, 0, None, "no"], ids=str)
def test_auto_that_neither_remembers_nor_does_not_is_refused(value):
    with refused(ArgumentError, "Auto.remembers", f"given {value!r}"):
        mb.Auto(remembers=value)


@pytest.mark.parametrize(("name", "fix"), [("lengths", "attention_mask"), ("trim", "width")])
def test_tokens_by_what_is_no_function_is_told_how_one_looks(name, fix):
    with refused(ArgumentError, f"Tokens.{name}", "given 3", f"pass {name}=lambda ", fix):
        mb.Tokens(8, **{"lengths": len, name: 3})


@pytest.mark.parametrize(
    ("kind", "action", "name"), [(3, print, "kind"), (int, print, "kind"), (mb.Updated, 3, "action")]
)
def test_listener_to_nothing_is_refused_where_it_is_made(kind, action, name):
    with refused(ArgumentError, name):
        mb.on(kind, action)


def test_a_weight_that_is_text_is_shown_as_text():
    setup = started()
    setup.loss_fn[0] = lambda model, batch: mb.Loss(logits(model, batch).sum(), "3")  # pyright: ignore[reportArgumentType]
    with refused(LossError, "given '3'"):
        setup.step(samples())


BAD_OPTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (mb.ReplicatedSync, {"overlap": 1}),
    (mb.ReplicatedSync, {"cross_check": "no"}),
    (mb.WrappedSync, {"cross_check": None}),
    (mb.ShardedSync, {"cross_check": 0}),
    (mb.ShardedSync, {"policy": "keep-last"}),
    (mb.ShardedSync, {"memory_limit_bytes": -1}),
    (mb.ShardedSync, {"memory_limit_bytes": 1e9}),
    (mb.Policy, {"keep_parameters": 1, "reduce_last": False}),
    (mb.Policy, {"reduce_last": "each", "keep_parameters": True}),
    (mb.launch.init, {"backend": "nccl2"}),
    (mb.launch.init, {"backend": 3}),
    (mb.launch.spawn, {"function": 3, "num_processes": 1}),
    (LengthCost.measure, {"micro_step": 3, "lengths": [1, 2]}),
]


@pytest.mark.parametrize(
    ("make", "options"), BAD_OPTIONS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_option_of_many_ranks_out_of_domain_is_refused(make, options):
    name, value = next(iter(options.items()))
    with refused(ArgumentError, f"{name}: given {value!r}; expected "):
        make(**options)
