"""`micro_batch="auto"`: what is chosen fits, what does not fit runs again to the same bits, and trying leaves no trace.

A limit on what PyTorch's operators allocate (`HostMemory`) stands in for the memory of a GPU: it is measured, and
really refuses.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.errors import ArgumentError, LossError, NoMemoryError
from macrobatch.plan.memory import HostMemory
from macrobatch.testing.scripts import run_script

pytestmark = pytest.mark.xdist_group("ranks")

WIDTH, ROWS = 16, 240


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MACROBATCH_CACHE", str(tmp_path / "cache"))


class Setup(NamedTuple):
    """How a step is built, from a seed of its own, so that two are alike to the bit."""

    network: Callable[[], nn.Module]
    loss_fn: Any
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda params: torch.optim.AdamW(params, lr=1e-2)
    options: Callable[[], dict[str, Any]] = dict


def network(*extra: nn.Module) -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), *extra)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def weighted_loss(model: nn.Module, batch: Any) -> mb.Loss:
    losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return mb.Loss((losses * batch["weight"]).sum(), batch["weight"].sum())


def two_terms(model: nn.Module, batch: Any) -> dict[str, mb.Loss]:
    logits, kept = model(batch["x"]), batch["y"] > 1
    return {
        "all": mb.Loss(F.cross_entropy(logits, batch["y"], reduction="sum"), len(logits)),
        "kept": mb.Loss((logits[kept] ** 2).sum(), int(kept.sum())),
    }


def noisy_loss(model: nn.Module, batch: Any) -> Tensor:
    noise = torch.from_numpy(np.random.standard_normal(batch["x"].shape).astype(np.float32))
    return mean_loss(model, {**batch, "x": batch["x"] * (1 + random.random()) + 0.1 * noise})


def encode(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return F.normalize(model(batch["x"]), dim=1), F.normalize(model(batch["x"].flip(1)), dim=1)


def coupled(representations: tuple[Tensor, Tensor]) -> Tensor:
    left_BD, right_BD = representations
    return (left_BD - right_BD).square().mean() - left_BD.var(0).sum() - right_BD.var(0).sum()


def half_scaled() -> dict[str, Any]:
    return {"precision": mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))}


SETUPS = {
    "plain": Setup(network, mean_loss, options=lambda: {"clip_norm": 0.1}),
    "dropout": Setup(lambda: network(nn.Dropout(0.3)), mean_loss),
    "batchnorm": Setup(lambda: network(nn.BatchNorm1d(WIDTH)), mean_loss),
    "weights": Setup(network, weighted_loss),
    "two terms": Setup(
        network, two_terms, options=lambda: {"count": lambda b: {"all": len(b["y"]), "kept": int((b["y"] > 1).sum())}}
    ),
    "python and numpy": Setup(network, noisy_loss),
    "fp16 scaler": Setup(network, mean_loss, options=half_scaled),
    "two passes": Setup(lambda: network(nn.Dropout(0.3)), mb.TwoPass(encode, coupled)),
    "lbfgs": Setup(lambda: network(nn.Dropout(0.3)), mean_loss, lambda params: torch.optim.LBFGS(params, max_iter=3)),
}


def batch_of(num_rows: int = ROWS) -> Any:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_rows, WIDTH, generator=generator)
    y = torch.randint(0, 4, (num_rows,), generator=generator)
    return {"x": x, "y": y, "weight": torch.rand(num_rows, generator=generator)}


class Built(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: mb.TrainStep


def build(setup: Setup, micro_batch: Any) -> Built:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = setup.network()
    optimizer = setup.optimizer(model.parameters())
    step = mb.TrainStep(model, optimizer, setup.loss_fn, micro_batch=micro_batch, **setup.options())
    return Built(model, optimizer, step)


def state_of(built: Built) -> dict[str, Any]:
    """All that a window can change, as bytes and plain values."""
    model, optimizer, step = built
    tensors = {**model.state_dict(), "rng": torch.get_rng_state()}
    tensors |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    for index, state in enumerate(optimizer.state_dict()["state"].values()):
        tensors |= {f"optimizer {index} {k}": v for k, v in state.items() if isinstance(v, Tensor)}
    found: dict[str, Any] = {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
    found |= {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)["state"]["key"].tobytes()}
    return found | {"step": step.state_dict()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def peak_of(setup: Setup, sizes: list[int]) -> int:
    """Most bytes that are allocated while a step is built and runs a window of micro-batches of these sizes."""
    with HostMemory() as memory:
        run(build(setup, 1), sizes)
        return memory.peak_bytes


def run(built: Built, sizes: list[int]) -> mb.StepResult:
    """A window of micro-batches of these sizes."""
    batch = batch_of(sum(sizes))
    count = built.step._count
    return built.step.window(split(batch, sizes), expected=None if count is None else count(batch))


def split(batch: Any, sizes: list[int]) -> list[Any]:
    columns = [leaf.split(sizes) for leaf in batch.values()]
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*columns, strict=True)]


def limit_between(setup: Setup, fits: list[int], too_large: list[int]) -> int:
    low, high = peak_of(setup, fits), peak_of(setup, too_large)
    assert low < 0.95 * high, "the window's peak must be in its micro-batches"
    return (low + high) // 2


@pytest.mark.parametrize("name", SETUPS)
def test_a_window_that_did_not_fit_has_the_bits_of_one_that_was_smaller_from_the_start(name, caplog):
    setup = SETUPS[name]
    given = [240, 240, 70]
    expected = [120, 120, 120, 120, 70]
    limit = limit_between(setup, expected, given)
    with HostMemory(limit) as memory, caplog.at_level(logging.INFO, logger="macrobatch"):
        retried = build(setup, mb.Auto(memory=memory))
        results = [run(retried, given) for _ in range(2)]
    assert [result.num_micro_batches for result in results] == [5, 5]
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "micro-batch: 120 samples instead of 240, since memory ran out"
    ]
    direct = build(setup, 1)
    straight = [run(direct, expected) for _ in range(2)]
    assert differing(state_of(retried), state_of(direct)) == []
    assert [float(r.loss) for r in results] == [float(r.loss) for r in straight]
    other = build(setup, 1)
    for _ in range(2):
        run(other, given)
    assert differing(state_of(other), state_of(direct)), "the control: another split has other bits"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("sizes", [[240, 240], [60, 60, 240]], ids=["first", "last"])
def test_memory_that_runs_out_in_a_forward_and_in_a_backward(sizes, where):
    setup = Setup(lambda: network(nn.Dropout(0.3)), mean_loss, lambda params: torch.optim.SGD(params, lr=0.1))
    through: list[int] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        loss = mean_loss(model, batch)
        through.append(len(batch["x"]))
        return loss

    batch, small, given = batch_of(240), batch_of(2), split(batch_of(sum(sizes)), sizes)
    with HostMemory() as memory:
        built = build(setup, 1)
        built.step.window([small])
        with memory.measured() as forward:
            loss = mean_loss(built.model, batch)
        with memory.measured() as both:
            loss.backward()
        del loss
    assert forward.num_bytes + 4000 < both.num_bytes
    limit = forward.num_bytes - 4000 if where == "forward" else both.num_bytes - 2000
    with HostMemory(limit) as memory:
        retried = build(setup._replace(loss_fn=watched), mb.Auto(memory=memory))
        retried.step.window(given)
    before = [size for size in sizes if size < 240]
    parts = [size for size in sizes for size in ([120, 120] if size == 240 else [size])]
    assert through == before + ([240] if where == "backward" else []) + parts
    direct = build(setup, 1)
    run(direct, parts)
    assert differing(state_of(retried), state_of(direct)) == []


def test_a_stream_keeps_what_it_gave_for_a_second_run(caplog):
    setup, read = SETUPS["dropout"], []
    sizes, parts = [60, 240, 240], [60, 120, 120, 120, 120]

    def stream():
        for part in split(batch_of(540), sizes):
            read.append(len(part["x"]))
            yield part

    with HostMemory(limit_between(setup, parts, sizes)) as memory:
        retried = build(setup, mb.Auto(memory=memory))
        result = retried.step.window(stream())
    assert read == sizes, "each was read once"
    assert result.num_micro_batches == 5
    direct = build(setup, 1)
    direct.step.window(iter(split(batch_of(540), parts)))
    assert differing(state_of(retried), state_of(direct)) == []


def test_the_chosen_size_fits_the_limit_and_the_largest_is_found():
    setup = SETUPS["plain"]
    batch = batch_of(1000)
    limit = peak_of(setup, [300])
    with HostMemory(limit) as memory:
        built = build(setup, mb.Auto(memory_fraction=1.0, memory=memory))
        assert built.step(batch).skipped is None
        survey = built.step.split.survey
        assert survey.limit_bytes == limit - survey.reserved_bytes
        # the two moments of AdamW, and one count for each of the 8 parameters
        assert survey.reserved_bytes == 8 * sum(p.numel() for p in built.model.parameters()) + 8 * 4
        assert built.step.split.size == survey.size <= survey.largest
        peaks: Any = {trial.size: trial.peak_bytes for trial in survey.trials}
        assert peaks[survey.size] <= peaks[survey.largest] <= survey.limit_bytes
        beyond = peaks.get(survey.largest + 1)
        assert survey.largest + 1 in peaks, "one more was tried"
        assert beyond is None or beyond > survey.limit_bytes
        assert memory.peak_bytes <= limit


def test_the_fastest_of_what_fits_is_chosen():
    """A loss that takes longer for more than 100 samples, by far more than any noise."""

    def slow(model: nn.Module, batch: Any) -> Tensor:
        loss = mean_loss(model, batch)
        for _ in range(300 if len(batch["x"]) > 100 else 0):
            loss = loss + 0 * model(batch["x"]).sum()
        return loss

    built = build(Setup(network, slow), mb.Auto(remembers=False))
    built.step(batch_of(240))
    survey = built.step.split.survey
    assert survey.largest == 240
    assert survey.size <= 100


def test_trying_leaves_no_trace():
    """The step after planning is, to the bit, the step of a size that was given; the user's loss function saw more."""
    setup = Setup(lambda: network(nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)), noisy_loss, options=half_scaled)
    built = build(setup, mb.Auto(remembers=False))
    stray = torch.ones_like(next(built.model.parameters()))
    next(built.model.parameters()).grad = stray
    before = state_of(built)
    built.step.split.cut(batch_of())
    assert built.step.split.survey is not None
    assert differing(state_of(built), before) == []
    assert next(built.model.parameters()).grad is stray
    assert torch.equal(stray, torch.ones_like(stray))
    batch = batch_of()
    built.step(batch)
    direct = build(setup, built.step.split.size)
    direct.step(batch_of())
    assert differing(state_of(built), state_of(direct)) == []
    assert all(torch.equal(batch[name], leaf) for name, leaf in batch_of().items())


def test_a_batch_that_the_loss_changes_in_place_survives_trying():
    def in_place(model: nn.Module, batch: Any) -> Tensor:
        batch["x"].mul_(0.5)
        return mean_loss(model, batch)

    built = build(Setup(network, in_place), mb.Auto(remembers=False))
    built.step(batch_of())
    direct = build(Setup(network, in_place), built.step.split.size)
    direct.step(batch_of())
    assert differing(state_of(built), state_of(direct)) == []


def test_a_changed_batch_is_not_run_again():
    def in_place(model: nn.Module, batch: Any) -> Tensor:
        batch["x"].mul_(0.5)
        return mean_loss(model, batch)

    setup = Setup(network, in_place)
    with HostMemory(limit_between(setup, [120, 120], [240])) as memory:
        built = build(setup, mb.Auto(memory=memory))
        before = state_of(built)
        with pytest.raises(LossError, match="changes in place"):
            run(built, [240])
        assert differing({**state_of(built), "step": 0}, {**before, "step": 0}) == []


def test_one_sample_that_does_not_fit():
    setup = Setup(lambda: nn.Sequential(nn.Linear(WIDTH, 4096), nn.Linear(4096, 4)), mean_loss)
    with HostMemory() as memory:
        build(setup, 1)
    held = memory.peak_bytes
    with HostMemory(
        3 * held
    ) as memory:  # weights and gradients, and then 16 kB for a sample's hidden layer are too many
        built = build(setup, mb.Auto(memory=memory))
        memory.limit_bytes = memory.num_bytes * 2 + 10_000
        before = state_of(built)
        with pytest.raises(NoMemoryError, match="a single sample, which does not fit into memory") as error:
            built.step(batch_of(4))
        assert isinstance(error.value, torch.OutOfMemoryError)
        with pytest.raises(NoMemoryError, match="a single sample, which does not fit"):
            built.step.window(split(batch_of(4), [3, 1]))
        after = state_of(built)
        assert after["step"]["window"].pop("num_dropped") == 1, "the window's only micro-batch, of the last size"
        before["step"]["window"].pop("num_dropped")
        assert differing(after, before) in ([], ["step"])


def test_memory_that_runs_out_in_the_optimizer_is_not_retried():
    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise torch.OutOfMemoryError("in the optimizer")

    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return mean_loss(model, batch)

    built = build(Setup(network, counted, lambda params: Greedy(params, lr=0.1)), mb.Auto())
    with pytest.raises(torch.OutOfMemoryError, match="in the optimizer"):
        run(built, [30, 30])
    assert len(calls) == 2


def test_a_given_size_is_not_changed():
    setup = SETUPS["plain"]
    with HostMemory(limit_between(setup, [120, 120], [240])):
        built = build(setup, 240)
        before = state_of(built)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            built.step(batch_of(240))
        assert differing({**state_of(built), "step": 0}, {**before, "step": 0}) == []


def test_it_grows_back(caplog):
    setup = SETUPS["plain"]
    with HostMemory(limit_between(setup, [120, 120], [240])) as memory:
        built = build(setup, mb.Auto(memory=memory))
        sizes = []
        with caplog.at_level(logging.INFO, logger="macrobatch"):
            for index in range(60):
                if index == 40:
                    memory.limit_bytes = None
                run(built, [240])
                sizes.append(built.step.split.size)
    # 16 windows without trouble, a try, back again, and then twice as many
    assert sizes == [120] * 15 + [240] + [120] * 31 + [240] * 13
    assert [record.message.split(" (")[0].split(", tried")[0] for record in caplog.records] == [
        "micro-batch: 120 samples instead of 240, since memory ran out",
        "micro-batch: 240 samples instead of 120",
        "micro-batch: 120 samples instead of 240, since memory ran out",
        "micro-batch: 240 samples instead of 120",
    ]


def test_what_was_measured_is_remembered(tmp_path, caplog):
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch["x"]))
        return mean_loss(model, batch)

    setup = Setup(network, counted)

    def runs(setup: Setup = setup, num_rows: int = 60, **options: Any) -> tuple[int, Any]:
        calls.clear()
        built = build(Setup(setup.network, setup.loss_fn, setup.optimizer, lambda: options), "auto")
        result = built.step(batch_of(num_rows))
        return len(calls) - result.num_micro_batches, built.step.split.size

    tried, size = runs()
    assert tried > 0
    (file,) = (tmp_path / "cache").iterdir()
    assert runs() == (0, size)
    assert runs(num_rows=61)[0] > 0, "another macro-batch"
    assert runs(precision="bf16")[0] > 0, "another precision"
    assert runs(Setup(lambda: network(nn.Dropout(0.1)), counted))[0] > 0, "another model"
    assert runs(Setup(network, counted, lambda p: torch.optim.SGD(p, lr=0.1)))[0] > 0, "another optimizer"
    for content in (b"", file.read_bytes()[:40], b"{}", b'{"key": {}, "value": {}}', b"[1]", b"\xff", damaged(file)):
        file.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="macrobatch"):
            assert runs()[0] > 0
        (record,) = caplog.records
        assert "is ignored and will be written anew" in record.message
        assert runs()[0] == 0, "written anew"


def damaged(file: Any) -> bytes:
    content = json.loads(file.read_text())
    content["value"]["size"] = 10**9
    return json.dumps(content).encode()


def test_remembering_can_be_turned_off_and_may_fail(tmp_path, monkeypatch, caplog):
    built = build(SETUPS["plain"], mb.Auto(remembers=False))
    built.step(batch_of(20))
    monkeypatch.setenv("MACROBATCH_CACHE", "")
    build(SETUPS["plain"], "auto").step(batch_of(20))
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("MACROBATCH_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="macrobatch"):
        build(SETUPS["plain"], "auto").step(batch_of(20))
    assert any("cannot be remembered" in record.message for record in caplog.records)


WRITER = """
import sys
from pathlib import Path
from macrobatch.plan.cache import Cache
cache, key = Cache(Path(sys.argv[1])), {"a": 1}
for turn in range(50):
    cache.store(key, {"numbers": [turn] * 2000})
    value = cache.load(key)
    assert value is not None and len(set(value["numbers"])) == 1, value
"""


def test_several_writers_do_no_harm(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(WRITER, encoding="utf-8")
    done = run_script(script, str(folder), processes=[{}, {}])
    assert done.codes == [0, 0], done.stderr
    assert done.stderr == ["", ""], "no file was seen half written"
    assert len([*folder.iterdir()]) == 1


def test_tokens_are_counted_if_lengths_are_given():
    torch.manual_seed(0)
    lengths = torch.randint(1, 30, (80,))
    ids = torch.ones(80, 30, dtype=torch.long) * (torch.arange(30) < lengths[:, None])
    seen = []

    def loss_fn(model: nn.Module, ids_BT: Tensor) -> mb.Loss:
        seen.append(ids_BT.shape)
        return mb.Loss((model(ids_BT).square() * (ids_BT != 0)[..., None]).sum(), int((ids_BT != 0).sum()))

    with HostMemory() as memory:
        model = nn.Embedding(2, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        auto = mb.Auto(lengths=lambda ids: (ids != 0).sum(1), trim=lambda ids, width: ids[:, :width], memory=memory)
        memory.limit_bytes = 200_000
        step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=auto)
        result = step(ids)
        size = step.split.size
        shapes = seen[-result.num_micro_batches :]
        assert step.split.survey.unit == "tokens"
        assert step.split.survey.largest < 2400, "the limit cuts"
        assert all(rows * width <= max(size, 30) for rows, width in shapes)
        memory.limit_bytes = 60_000
        assert step(ids).num_micro_batches > result.num_micro_batches
        memory.limit_bytes = memory.num_bytes + 3_100  # enough to count tokens, not for 29 of them in 8 channels
        with pytest.raises(NoMemoryError, match="a single sample of 29 tokens"):
            step(ids)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"normalize": "uniform"}, "normalize"),
        ({"normalize": mb.Constant(4)}, "normalize"),
    ],
    ids=str,
)
def test_a_gradient_that_depends_on_the_size_is_refused(options, what):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=what):
        mb.TrainStep(model, optimizer, mean_loss, **options)
    mb.TrainStep(model, optimizer, mean_loss, micro_batch=4, **options)


@pytest.mark.parametrize(
    "options", [{"memory_fraction": 0}, {"memory_fraction": 1.5}, {"memory_fraction": "90%"}], ids=str
)
def test_bad_options(options):
    with pytest.raises(ArgumentError, match="memory_fraction"):
        mb.Auto(**options)


@pytest.mark.parametrize("options", [{"memory": 10}, {"trim": len}, {"lengths": 3}], ids=str)
def test_bad_parts(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        mb.Auto(**options)


def test_only_a_step_finds_its_size_out():
    for function in (mb.accumulate, mb.verify):
        with pytest.raises(ArgumentError, match="only a TrainStep"):
            function(network(), mean_loss, batch_of(4), micro_batch="auto")
