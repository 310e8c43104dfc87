"""The proof on a user's own model: it passes what is exact, names what is not, and leaves everything as it was."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.core.snapshot import rng_states
from macrobatch.errors import ArgumentError, BatchError, LossError, NonFiniteError
from macrobatch.testing.models import CASES

# Gradients of some hundred float64 terms in another order of addition: a few 1e-16, and room for cancellation.
EXACT = 1e-14
# What the faults below do to a gradient: each of them changes it by more than a percent.
WRONG = 1e-2


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def squares(model: Any, x_BC: Tensor) -> Tensor:
    return model(x_BC).square().mean()


def found(report: mb.Report) -> list[str]:
    return [finding.culprit for finding in report.findings]


def the_finding(model: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: Any, **options: Any) -> mb.Finding:
    """The only finding of a case that is not exact."""
    settings: dict[str, Any] = {"micro_batch": 2} | options
    report = mb.verify(model, loss_fn, batch, **settings)
    assert not report.ok
    assert report.error > WRONG or math.isnan(report.error)
    (finding,) = report.findings
    return finding


# --- what is exact ---


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 50], ids=lambda n: f"micro_batch {n}")
@pytest.mark.parametrize("name", CASES)
def test_exact_case_passes(name, micro_batch):
    model, batch, loss_fn = CASES[name](7)
    report = mb.verify(model, loss_fn, batch, micro_batch=micro_batch)
    assert report.ok
    assert report.error < EXACT
    assert report.findings == ()


@pytest.mark.parametrize(
    "trim", [None, lambda part, width: {key: leaf[:, :width] for key, leaf in part.items()}], ids=["whole", "trimmed"]
)
def test_exact_split_by_tokens_passes(trim):
    model, batch, loss_fn = CASES["tied_lm"](8)
    split = mb.Tokens(18, lengths=lambda batch: (batch["labels"] != -100).sum(1), trim=trim)
    assert mb.verify(model, loss_fn, batch, micro_batch=split).error < EXACT


@pytest.mark.parametrize(
    "batch_norm", [nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4))], ids=["norm", "both"]
)
def test_batch_norm_and_dropout_in_eval_pass(batch_norm):
    model = nn.Sequential(nn.Linear(3, 4), batch_norm, nn.Linear(4, 1)).eval()
    assert mb.verify(model, squares, torch.randn(6, 3), micro_batch=2).error < EXACT


def test_bfloat16_model_and_batch_are_proven_in_float64():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    report = mb.verify(model, squares, torch.randn(5, 3, dtype=torch.bfloat16), micro_batch=2)
    assert report.error < EXACT
    assert model.weight.dtype == torch.bfloat16


def test_dtype_is_what_it_computes_in():
    seen: list[torch.dtype] = []

    def loss_fn(model: Any, x_BC: Tensor) -> Tensor:
        seen.append(x_BC.dtype)
        return squares(model, x_BC)

    report = mb.verify(nn.Linear(3, 2), loss_fn, torch.randn(5, 3), micro_batch=2, dtype=torch.float32)
    assert set(seen) == {torch.float32}
    assert report.ok  # float32 rounds at 6e-8; the tolerance is 1e-6
    assert report.tolerance == 1e-6


def test_tolerance_decides():
    case = CASES["mlp"](7)
    report = mb.verify(case.model, case.loss_fn, case.batch, micro_batch=2, tolerance=1e-30)
    assert report.tolerance == 1e-30
    assert report.ok is (report.error == 0.0)
    assert found(report) == ([] if report.ok else ["the model or the loss"])  # beyond it, and nothing is at fault
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    report = mb.verify(model, squares, torch.randn(6, 3), micro_batch=2, tolerance=1e3)
    assert report.error > WRONG
    assert report.ok
    assert found(report) == []


def test_terms_with_denominators_of_their_own_pass():
    def loss_fn(model: Any, batch: Any) -> dict[str, mb.Loss]:
        logits = model(batch["x"])
        return {
            "classes": mb.cross_entropy(logits, batch["y"]),
            "size": mb.Loss(logits.square().sum(), logits.numel()),
        }

    labels = torch.tensor([0, 1, -100, -100, 2, 0, -100])
    report = mb.verify(nn.Linear(4, 3), loss_fn, {"x": torch.randn(7, 4), "y": labels}, micro_batch=3)
    assert report.error < EXACT


class Contrastive(nn.Module):
    """Loss over pairs, with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.log_temperature = nn.Parameter(torch.tensor(0.3))


def infonce(representations: tuple[Tensor, Tensor]) -> Tensor:
    left_BD, right_BD = representations
    return F.cross_entropy(left_BD @ right_BD.T, torch.arange(len(left_BD)))


def test_two_pass_loss_passes():
    def encode(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        scale = model.log_temperature.exp()
        return F.normalize(model.encoder(batch[0])) * scale, F.normalize(model.encoder(batch[1]))

    report = mb.verify(
        Contrastive(), mb.TwoPass(encode, infonce), (torch.randn(7, 4), torch.randn(7, 4)), micro_batch=3
    )
    assert report.ok
    assert report.error < EXACT


def test_two_pass_loss_with_batch_norm_names_it():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    loss_fn = mb.TwoPass(lambda model, batch: (model(batch[0]), model(batch[1])), infonce)
    finding = the_finding(model, loss_fn, (torch.randn(6, 4), torch.randn(6, 4)))
    assert finding.culprit == "BatchNorm1d at model.1"


def test_two_pass_loss_whose_encoder_couples_rows_is_not_sent_to_two_pass():
    def encode(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        left_BD, right_BD = model(batch[0]), model(batch[1])
        return left_BD - left_BD.mean(0), right_BD

    report = mb.verify(nn.Linear(4, 3), mb.TwoPass(encode, infonce), (torch.randn(6, 4),) * 2, micro_batch=2)
    assert not report.ok
    assert report.error > WRONG
    assert not any("use TwoPass" in finding.advice for finding in report.findings)


# --- modules that are at fault ---


class CenteredRows(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x_BC: Tensor) -> Tensor:
        return x_BC - x_BC.mean(0)


class FunctionalDropout(nn.Module):
    """Drops without a Dropout module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x_BC: Tensor) -> Tensor:
        return F.dropout(self.linear(x_BC), training=self.training)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (3, 3)), (nn.BatchNorm3d, (2, 2, 2))]
)
def test_batch_norm_is_named(kind, shape):
    finding = the_finding(nn.Sequential(nn.Flatten(1, 1), kind(4)), squares_and_sizes, torch.randn(6, 4, *shape))
    assert finding.culprit == f"{kind.__name__} at model.1"
    assert "statistics of each micro-batch" in finding.reason
    assert "GroupNorm" in finding.advice


def squares_and_sizes(model: Any, x: Tensor) -> Tensor:
    """A loss that a normalised batch does not make constant."""
    return model(x).add(0.5).pow(3).square().mean()


def test_batch_norm_without_running_statistics_is_named_in_eval_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert the_finding(model, squares_and_sizes, torch.randn(6, 4)).culprit == "BatchNorm1d at model.1"


def test_batch_norm_that_refuses_single_rows_is_named_beside_the_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    report = mb.verify(model, squares_and_sizes, torch.randn(5, 4), micro_batch=2)  # 2, 2, 1
    assert report.error == math.inf
    assert found(report) == ["a micro-batch", "BatchNorm1d at model.1"]
    assert "raises ValueError where the whole batch does not: Expected more than 1 value" in report.findings[0].reason


def test_dropout_is_named():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5))
    finding = the_finding(model, squares, torch.randn(6, 4))
    assert finding.culprit == "Dropout at model.1"
    assert "draws random numbers" in finding.reason
    assert "eval()" in finding.advice


def test_dropout_without_a_module_of_its_own_is_named_by_the_one_that_draws():
    finding = the_finding(nn.Sequential(nn.Linear(4, 4), FunctionalDropout()), squares, torch.randn(6, 4))
    assert finding.culprit == "FunctionalDropout at model.1"
    assert "draws random numbers" in finding.reason


def test_module_that_couples_rows_is_named():
    model = nn.Sequential(nn.Linear(4, 4), CenteredRows(), nn.Linear(4, 2))
    finding = the_finding(model, squares, torch.randn(6, 4))
    assert finding.culprit == "CenteredRows at model.1"
    assert finding.reason == "gives a sample another output when it stands in another batch"
    assert "TwoPass" in finding.advice


def test_model_that_couples_rows_itself_is_named():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x_BC: Tensor) -> Tensor:
            return self.linear(x_BC).softmax(0)

    assert the_finding(Whole(), squares, torch.randn(6, 4)).culprit == "Whole at model"


def test_module_with_keyword_inputs_and_a_tuple_of_outputs_is_named():
    class Pair(nn.Module):
        def forward(self, *, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, float]:
            return left + scale * right.mean(0), scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.pair = nn.Linear(4, 4), Pair()

        def forward(self, x_BC: Tensor) -> Tensor:
            return self.pair(left=self.linear(x_BC), right=x_BC, scale=0.5)[0]

    assert the_finding(Model(), squares, torch.randn(6, 4)).culprit == "Pair at model.pair"


def test_innermost_modules_are_named_and_not_what_contains_them():
    model = nn.Sequential(
        nn.Linear(4, 4), Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), Residual(CenteredRows())
    )
    report = mb.verify(model, squares, torch.randn(6, 4), micro_batch=2)
    assert found(report) == ["BatchNorm1d at model.1.body.1", "CenteredRows at model.2.body"]


def test_sound_modules_beside_it_are_not_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.GELU(), CenteredRows())
    assert the_finding(model, squares_and_sizes, torch.randn(6, 4)).culprit == "CenteredRows at model.4"


class WithPositions(nn.Module):
    """Has a module whose input has a row per position, not per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Dropout(0.5)

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1])
        return self.dropout(self.tokens(ids_BT) + self.positions(positions_T))


def test_module_with_another_number_of_rows_is_passed_over():
    finding = the_finding(WithPositions(), squares, torch.randint(0, 7, (6, 5)))
    assert finding.culprit == "Dropout at model.dropout"


def test_module_called_with_plain_numbers_is_passed_over():
    class Scale(nn.Module):
        def forward(self, factor: float) -> Tensor:
            return torch.tensor(factor)

    model = nn.ModuleDict({"scale": Scale(), "norm": nn.BatchNorm1d(4)})
    finding = the_finding(
        model, lambda model, x: (model["norm"](x) * model["scale"](0.5) + 1).pow(3).square().mean(), torch.randn(6, 4)
    )
    assert finding.culprit == "BatchNorm1d at model.norm"


def test_module_with_infinite_outputs_is_not_named():
    class Masked(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            return x_BC.index_fill(1, torch.tensor([0]), -math.inf)

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Masked())
    finding = the_finding(
        model, lambda model, x: F.cross_entropy(model(x), torch.ones(len(x), dtype=torch.long)), torch.randn(6, 4)
    )
    assert finding.culprit == "BatchNorm1d at model.1"


# --- losses that are at fault ---


def test_sum_as_a_bare_tensor_is_named():
    finding = the_finding(nn.Linear(3, 1), lambda model, x: model(x).square().sum(), torch.randn(5, 3))
    assert finding.culprit == "the loss"
    assert finding.reason == "is a sum over samples, but a bare tensor is taken as their mean"
    assert "Loss(loss, num_samples)" in finding.advice


def test_mean_as_the_total_is_named():
    finding = the_finding(nn.Linear(3, 1), lambda model, x: mb.Loss(squares(model, x), len(x)), torch.randn(5, 3))
    assert finding.culprit == "the loss"
    assert finding.reason == "has a mean for its total, where a sum belongs"
    assert "Loss(mean * weight, weight)" in finding.advice


def test_weight_that_does_not_add_up_is_named_with_both_numbers():
    finding = the_finding(nn.Linear(3, 1), lambda model, x: mb.Loss(model(x).square().sum(), 1), torch.randn(5, 3))
    assert finding.culprit == "the loss"
    assert finding.reason == "has the weight 1 as a whole and 3 in parts"


def token_mean(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def tokens_of_unequal_rows() -> dict[str, Tensor]:
    labels_BT = torch.randint(0, 5, (6, 4))
    labels_BT[:2, 1:] = -100
    return {"x": torch.randn(6, 4, 3), "y": labels_BT}


def test_token_mean_as_a_bare_tensor_is_named():
    finding = the_finding(nn.Linear(3, 5), token_mean, tokens_of_unequal_rows())
    assert finding.culprit == "the loss"
    assert "is not a mean over samples" in finding.reason
    assert "cross_entropy" in finding.advice


def test_token_mean_with_its_weight_passes():
    """The advice of the test above, taken."""
    report = mb.verify(
        nn.Linear(3, 5),
        lambda model, batch: mb.cross_entropy(model(batch["x"]), batch["y"]),
        tokens_of_unequal_rows(),
        micro_batch=2,
    )
    assert report.error < EXACT


def test_contrastive_loss_as_a_bare_tensor_is_sent_to_two_pass():
    finding = the_finding(
        nn.Linear(4, 3), lambda model, batch: infonce((model(batch[0]), model(batch[1]))), (torch.randn(6, 4),) * 2
    )
    assert finding.culprit == "the loss"
    assert "couples" in finding.reason
    assert "TwoPass" in finding.advice


def test_loss_whose_total_couples_samples_is_named():
    finding = the_finding(
        nn.Linear(4, 3),
        lambda model, batch: mb.Loss(
            infonce((model(batch[0]), model(batch[1]))).square() * len(batch[0]), len(batch[0])
        ),
        (torch.randn(6, 4), torch.randn(6, 4)),
    )
    assert finding.reason == "does not add up: the total of the batch is not the sum over its parts"
    assert "TwoPass" in finding.advice


def test_term_at_fault_is_named_and_the_sound_one_not():
    def loss_fn(model: Any, x_BC: Tensor) -> dict[str, mb.Loss]:
        y_BC = model(x_BC)
        return {
            "sound": mb.Loss(y_BC.square().sum(), len(x_BC)),
            "mean": mb.Loss(y_BC.square().mean(), len(x_BC)),
        }

    assert the_finding(nn.Linear(3, 1), loss_fn, torch.randn(5, 3)).culprit == "the loss term 'mean'"


def test_what_shows_in_the_gradient_alone_is_blamed_on_model_or_loss():
    """Its value is a mean over samples, in any split; its gradient has a part that grows with the micro-batch."""

    def loss_fn(model: Any, x_BC: Tensor) -> Tensor:
        y_BC = model(x_BC)
        return y_BC.square().mean() + (y_BC - y_BC.detach()).sum()

    finding = the_finding(nn.Linear(3, 1), loss_fn, torch.randn(6, 3))
    assert finding.culprit == "the model or the loss"
    assert "in a way not known here" in finding.reason


def test_micro_batch_that_raises_is_reported_with_its_error():
    def loss_fn(model: Any, x_BC: Tensor) -> Tensor:
        if len(x_BC) < 4:
            raise RuntimeError("needs four rows.")
        return squares(model, x_BC)

    report = mb.verify(nn.Linear(3, 1), loss_fn, torch.randn(6, 3), micro_batch=2)
    assert not report.ok
    assert found(report) == ["a micro-batch"]
    assert str(report.findings[0]).startswith(
        "a micro-batch: raises RuntimeError where the whole batch does not: needs four rows. Make "
    )


def test_error_on_the_whole_batch_is_the_users_own():
    def loss_fn(model: Any, x_BC: Tensor) -> Tensor:
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        mb.verify(nn.Linear(3, 1), loss_fn, torch.randn(6, 3), micro_batch=2)


@pytest.mark.parametrize("applies", [[True, True, False, False], [False] * 4], ids=["to some", "to none"])
def test_term_that_does_not_apply_to_a_micro_batch_passes(applies):
    """As TrainStep advises: a term that does not apply has total 0 and weight 0."""

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, mb.Loss]:
        losses_B = model(batch[0]).square().sum(1)
        num = int(batch[1].sum())
        return {
            "all": mb.Loss(losses_B.sum(), len(losses_B)),
            "some": mb.Loss(losses_B[batch[1]].sum() if num else losses_B.new_zeros(()), num),
        }

    report = mb.verify(nn.Linear(3, 1), loss_fn, (torch.randn(4, 3), torch.tensor(applies)), micro_batch=2)
    assert report.ok


@pytest.mark.parametrize("against", [None, 3])
@pytest.mark.parametrize("is_same", [True, False], ids=["the same", "another"])
def test_loss_of_a_model_it_closes_over_is_refused(is_same, against):
    model, other = nn.Embedding(5, 3), nn.Embedding(5, 3)
    closed_over = model if is_same else other
    closed_over.weight.grad = held = torch.full((5, 3), 7.0)

    def loss_fn(_: Any, ids_B: Tensor) -> Tensor:
        return closed_over(ids_B).square().mean()  # instead of the argument

    with pytest.raises(LossError, match=r"the loss: given one that none of the .* parameters takes part in"):
        mb.verify(model, loss_fn, torch.arange(4), micro_batch=2, against=against)
    if is_same:
        assert model.weight.grad is held
        assert bool((held == 7).all())


@pytest.mark.parametrize(
    "against",
    [pytest.param(None), 3],
)
@pytest.mark.parametrize(
    "loss_fn",
    [lambda model, x: x.square().mean(), lambda model, x: squares(model, x).detach()],
    ids=["data", "detached"],
)
def test_loss_without_a_gradient_is_refused(loss_fn, against):
    with pytest.raises(LossError, match="parameters"):
        mb.verify(nn.Linear(3, 1), loss_fn, torch.randn(6, 3), micro_batch=2, against=against)


@pytest.mark.parametrize(
    ("loss_fn", "against"),
    [
        pytest.param(lambda model, x: (model(x) / 0).mean(), None, id="both"),
        pytest.param(lambda model, x: (model(x) / 0).mean(), 3, id="both, against a split"),
        pytest.param(lambda model, x: model(x).mul(0).sqrt().mean(), None, id="gradient"),
        pytest.param(lambda model, x: model(x).mul(0).sqrt().mean(), 3, id="gradient, against a split"),
        pytest.param(lambda model, x: model(x).mean() + math.inf, None, id="loss"),
        pytest.param(lambda model, x: model(x).mean() + math.inf, 3, id="loss, against a split"),
    ],
)
def test_batch_that_is_not_finite_itself_is_not_blamed_on_accumulation(loss_fn, against):
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        mb.verify(nn.Linear(3, 1), loss_fn, torch.randn(6, 3), micro_batch=2, against=against)


def test_micro_batch_that_is_not_finite_is_reported():
    report = mb.verify(
        nn.Linear(3, 1), lambda model, x: squares(model, x) / (len(x) == 6), torch.randn(6, 3), micro_batch=2
    )
    assert not report.ok
    assert found(report)[0] == "a micro-batch"
    assert report.findings[0].reason.startswith("raises NonFiniteError where the whole batch does not")


def test_micro_batch_without_one_of_the_terms_is_reported():
    def loss_fn(model: Any, x_BC: Tensor) -> dict[str, mb.Loss]:
        terms = {"all": mb.Loss(squares(model, x_BC) * len(x_BC), len(x_BC))}
        return terms | ({"first": mb.Loss(model(x_BC[:1]).sum(), 1)} if bool((x_BC == 0).any()) else {})

    report = mb.verify(nn.Linear(3, 1), loss_fn, torch.arange(1, 19.0).view(6, 3) % 18, micro_batch=2)
    assert not report.ok
    assert "a micro-batch" in found(report)


# --- against another split ---


def test_against_another_split_passes():
    case = CASES["tied_lm"](7)
    report = mb.verify(case.model, case.loss_fn, case.batch, micro_batch=2, against=3)
    assert report.ok
    assert report.error < EXACT


def as_loss(model: Any, x_BC: Tensor) -> mb.Loss:
    return mb.Loss(model(x_BC).square().sum(), len(x_BC))


def as_terms(model: Any, x_BC: Tensor) -> dict[str, mb.Loss]:
    return {"one": as_loss(model, x_BC), "other": mb.Loss(model(x_BC).sum(), 2 * len(x_BC))}


@pytest.mark.parametrize(
    "loss_fn",
    [squares, as_loss, as_terms, mb.TwoPass(lambda model, x: model(x), lambda y_BC: y_BC.square().mean())],
    ids=["mean", "Loss", "terms", "TwoPass"],
)
def test_against_never_runs_the_whole_batch(loss_fn):
    """The point of it: the whole batch does not fit."""
    rows: list[tuple[str, int]] = []

    def looked_at(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows.append(("forward", len(args[0])))
        if output.requires_grad:
            output.register_hook(lambda grad: rows.append(("backward", len(grad))))

    model = nn.Linear(3, 1)
    model.register_forward_hook(looked_at)
    report = mb.verify(model, loss_fn, torch.randn(6, 3), micro_batch=2, against=3)
    assert report.ok
    assert set(rows) == {(direction, size) for direction in ("forward", "backward") for size in (2, 3)}


def test_against_never_runs_the_whole_batch_to_find_what_breaks():
    rows: list[int] = []

    def loss_fn(model: Any, x_BC: Tensor) -> Tensor:
        rows.append(len(x_BC))
        return squares_and_sizes(model, x_BC)

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert the_finding(model, loss_fn, torch.randn(12, 4), micro_batch=3, against=4).culprit == "BatchNorm1d at model.1"
    assert set(rows) == {3, 4}


def test_against_another_split_names_what_breaks():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    finding = the_finding(model, squares_and_sizes, torch.randn(12, 4), micro_batch=3, against=4)
    assert finding.culprit == "BatchNorm1d at model.1"


def test_against_takes_a_split():
    case = CASES["mlp"](7)
    assert mb.verify(case.model, case.loss_fn, case.batch, micro_batch=mb.Rows(2), against=mb.Rows(7)).error < EXACT


# --- everything stays as it was ---


def busy_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), CenteredRows(), nn.Linear(4, 2))
    model[4].eval()
    for param in model.parameters():
        param.grad = torch.full_like(param, 7.0)
    return model


def raising(model: Any, x_BC: Tensor) -> Tensor:
    drawing(model, x_BC)
    raise KeyError("half way")


def drawing(model: Any, x_BC: Tensor) -> Tensor:
    return squares(model, x_BC) * (random.random() + np.random.rand() + float(torch.rand(())))


@pytest.mark.parametrize("loss_fn", [squares, drawing, raising])
def test_verify_leaves_model_gradients_hooks_and_generators_alone(loss_fn):
    model, batch = busy_model(), torch.randn(6, 4)
    before = copy.deepcopy(model.state_dict())
    grads = [(param.grad, param.grad.clone()) for param in model.parameters() if param.grad is not None]
    modes = [module.training for module in model.modules()]
    rng, x_BC = rng_states(torch.device("cpu")), batch.clone()
    try:
        assert not mb.verify(model, loss_fn, batch, micro_batch=2).ok
    except KeyError:
        assert loss_fn is raising
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [id(param.grad) for param in model.parameters()] == [id(grad) for grad, _ in grads]
    assert all(torch.equal(grad, saved) for grad, saved in grads)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(param.dtype == torch.float32 for param in model.parameters())
    found = rng_states(torch.device("cpu"))
    assert torch.equal(found.torch[0], rng.torch[0])
    assert found.python == rng.python
    np.testing.assert_equal(found.numpy, rng.numpy)
    assert torch.equal(batch, x_BC)


def test_verify_inside_training_changes_nothing_for_the_step():
    losses: list[list[float]] = []
    for verifies in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).to(torch.bfloat16)
        step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), squares, micro_batch=2)
        losses.append([])
        for _ in range(3):
            batch = torch.randn(5, 4, dtype=torch.bfloat16)
            losses[-1].append(step(batch).loss)
            if verifies:
                mb.verify(model, squares, batch, micro_batch=2)
    assert losses[0] == losses[1]


# --- the report and bad input ---


def test_report_of_an_exact_case_reads_as_one_line():
    case = CASES["mlp"](4)
    report = mb.verify(case.model, case.loss_fn, case.batch, micro_batch=2)
    assert str(report) == f"exact: relative gradient error {report.error:.1e} (tolerance 1e-06)"


def test_report_names_findings_and_the_worst_parameters_first():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    report = mb.verify(model, squares, torch.randn(6, 3), micro_batch=2)
    lines = str(report).splitlines()
    assert lines[0] == f"NOT exact: relative gradient error {report.error:.1e} (tolerance 1e-06)"
    assert lines[1] == f"  - {report.findings[0]}"
    assert lines[2].startswith("  worst parameters: ")
    errors = list(report.worst.values())
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 3
    assert set(report.worst) <= {name for name, _ in model.named_parameters()}


def test_report_error_is_relative_to_the_whole_gradient():
    """A loss that is twice too large in parts has the relative error 1: |2g − g| / |g|."""
    report = mb.verify(
        nn.Linear(3, 1),
        lambda model, x: squares(model, x) * (1 if len(x) == 6 else 2),
        torch.randn(6, 3),
        micro_batch=2,
    )
    assert report.error == pytest.approx(1.0, rel=1e-12)  # float64 rounding of a few terms
    assert list(report.worst.values()) == pytest.approx([1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("micro_batch", [0, True, "two", "auto"])
def test_micro_batch_out_of_domain_is_refused(micro_batch):
    with pytest.raises(ArgumentError, match="micro_batch"):
        mb.verify(nn.Linear(3, 1), squares, torch.randn(6, 3), micro_batch=micro_batch)


def test_batch_without_rows_is_refused():
    with pytest.raises(BatchError):
        mb.verify(nn.Linear(3, 1), squares, {"a": 1}, micro_batch=2)


@pytest.mark.parametrize(
    "output",
    [
        None,
        1.0,
        torch.ones(3),
        [torch.ones(())],
        {"term": torch.ones(())},
        {"term": 1.0},
        {},
    ],
    ids=str,
)
def test_what_is_no_loss_is_refused(output):
    with pytest.raises(LossError, match=r"what loss_fn returned|the loss: given a torch.float32 tensor of shape"):
        mb.verify(nn.Linear(3, 1), lambda model, x: output, torch.randn(6, 3), micro_batch=2)


@pytest.mark.parametrize(
    "output",
    [
        None,
        1.0,
        torch.ones(3),
        [torch.ones(())],
        {"term": torch.ones(())},
        {"term": 1.0},
        {},
    ],
    ids=str,
)
def test_what_is_no_loss_is_refused_against_another_split(output):
    with pytest.raises(LossError):
        mb.verify(nn.Linear(3, 1), lambda model, x: output, torch.randn(6, 3), micro_batch=2, against=3)


@pytest.mark.parametrize("against", [None, 3])
def test_model_without_trainable_parameters_is_refused(against):
    model = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ArgumentError, match="model: given no parameter that requires grad"):
        mb.verify(model, squares, torch.randn(6, 3), micro_batch=2, against=against)
