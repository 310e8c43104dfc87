"""Checkpoints of everything: training goes on to the bit, from the middle of a window and on other numbers of ranks,
and what does not fit is refused before anything has changed."""

from __future__ import annotations

import importlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.accelerate.utils import ProjectConfiguration
from macrobatch.errors import ArgumentError, PeerError, StateError, WindowError
from macrobatch.testing.scripts import run_script
from tests.accelerate.doors import ORIGINAL, OURS, build, entered

pytestmark = pytest.mark.xdist_group("ranks")

SIZE = 44
NUM_STEPS = 4


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


class Run:
    """A training with dropout, momentum and a schedule, whose every random number counts."""

    def __init__(self, **options: Any) -> None:
        self.accelerator = build(gradient_accumulation_steps=NUM_STEPS, **options)
        model: Any = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 1)).double()
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.05)
        scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loader: Any = DataLoader(data(), batch_size=2, shuffle=True)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def epoch(self, batches: Any, stop: int | None = None) -> None:
        for index, (x, y) in enumerate(batches, start=1):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(((self.model(x) - y) ** 2).mean())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if index == stop:
                return

    def weights(self) -> list[float]:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()


def straight(seed: int, folder: Path, stop: int) -> list[float]:
    """Two epochs, with a checkpoint after `stop` batches of the first."""
    torch.manual_seed(seed)
    run = Run()
    batches = iter(run.loader)
    for index in range(1, len(run.loader) + 1):
        run.epoch([next(batches)])
        if index == stop:
            run.accelerator.save_state(str(folder / "checkpoint"))
    list(batches)
    run.epoch(run.loader)
    return run.weights()


def resumed(seed: int, folder: Path, stop: int | None) -> list[float]:
    """The same, from the checkpoint on; `stop` None for another number of ranks."""
    torch.manual_seed(seed)
    run = Run()
    run.accelerator.load_state(str(folder / "checkpoint"))
    run.epoch(run.accelerator.skip_first_batches(run.loader, *([] if stop is None else [stop])))
    run.epoch(run.loader)
    return run.weights()


# --- going on ---


@pytest.mark.parametrize(
    "stop", [4, 6, 21, 22]
)  # between two windows, inside one, inside the short last one, at the end
def test_one_process_goes_on_to_the_bit(tmp_path: Path, stop: int):
    expected = straight(0, tmp_path, stop)
    assert resumed(99, tmp_path, stop) == expected


def test_a_new_process_goes_on_to_the_bit(tmp_path: Path):
    expected = straight(0, tmp_path, 6)
    code = f"""
import importlib.util, json
from pathlib import Path
spec = importlib.util.spec_from_file_location("run", {__file__!r})
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
text = json.dumps(run.resumed(99, Path({str(tmp_path)!r}), 6))
Path({str(tmp_path / "weights.json")!r}).write_text(text)
"""
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    assert run_script(tmp_path / "script.py").codes == [0]
    assert json.loads((tmp_path / "weights.json").read_text()) == expected


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_two_ranks_go_on_to_the_bit(ranks: Any, tmp_path: Path, stop: int):
    expected = ranks(2).run(straight, 0, tmp_path, stop)
    assert expected[0] == expected[1]
    assert ranks(2).run(resumed, 99, tmp_path, stop) == expected


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def plainly(num_steps: int, folder: Path, stop: int | None, loads: bool = False) -> list[float]:
    """A training without randomness, so that it can be told what it should come to on any number of ranks."""
    accelerator = build(gradient_accumulation_steps=num_steps)
    model: Any = linear()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    loader: Any = DataLoader(data(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if loads:
        accelerator.load_state(folder / "checkpoint")
    for index, (x, y) in enumerate(accelerator.skip_first_batches(loader) if loads else loader, start=1):
        with accelerator.accumulate(model):
            accelerator.backward(((model(x) - y) ** 2).mean())
            optimizer.step()
            optimizer.zero_grad()
        if index == stop:
            accelerator.save_state(folder / "checkpoint")
            break
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def by_full_batches(windows: list[list[int]]) -> list[float]:
    """Weights after one update with the mean over all samples of each window's batches of two."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    inputs, targets = data().tensors
    for batches in windows:
        samples = [2 * batch + i for batch in batches for i in range(2)]
        optimizer.zero_grad()
        ((model(inputs[samples]) - targets[samples]) ** 2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def cut(*bounds: int) -> list[list[int]]:
    return [list(range(a, b)) for a, b in zip((0, *bounds), bounds, strict=False)]


@pytest.mark.parametrize(
    ("stop", "bounds"),
    # After 3 of each rank, 1 of each is in the window; 3 of 4 are still to come.
    [(2, (4, 8, 12, 16, 20, 22)), (3, (4, 9, 13, 17, 21, 22))],
)
def test_two_ranks_go_on_as_one(ranks: Any, tmp_path: Path, stop: int, bounds: tuple[int, ...]):
    ranks(2).run(plainly, 2, tmp_path, stop)
    # 1e-12: sums of another order in fp64
    assert plainly(4, tmp_path, None, True) == pytest.approx(by_full_batches(cut(*bounds)), rel=1e-12)


def test_one_goes_on_as_two_ranks(ranks: Any, tmp_path: Path):
    plainly(4, tmp_path, 3)
    windows = [*cut(5, 13, 21), [21, 3]]  # batch 3, the first of the rest, makes the last share as long as the other
    for weights in ranks(2).run(plainly, 4, tmp_path, None, True):
        assert weights == pytest.approx(by_full_batches(windows), rel=1e-12)


# --- names ---


def naming(folder: Path, **options: Any) -> dict[str, Any]:
    return {"project_config": ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, **options)}


@pytest.mark.better("W22")
def test_numbers_go_on_after_loading(tmp_path: Path):
    run = Run(**naming(tmp_path))
    assert [Path(run.accelerator.save_state()).name for _ in range(2)] == ["checkpoint_0", "checkpoint_1"]
    run = Run(**naming(tmp_path))
    with pytest.raises(ArgumentError, match=r"checkpoint_0, which exists.*load_state"):
        run.accelerator.save_state()
    run.accelerator.load_state()
    assert Path(run.accelerator.save_state()).name == "checkpoint_2"
    run = Run(**naming(tmp_path))
    run.accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_2")
    assert Path(run.accelerator.save_state()).name == "checkpoint_3"


@pytest.mark.better("W22")
def test_the_original_cannot_save_after_loading(tmp_path: Path):
    options = {"project_dir": str(tmp_path), "automatic_checkpoint_naming": True}
    configuration = importlib.import_module("accelerate.utils").ProjectConfiguration
    build(ORIGINAL, project_config=configuration(**options)).save_state()
    again = build(ORIGINAL, project_config=configuration(**options))
    again.load_state()
    with pytest.raises(ValueError, match="already exists"):
        again.save_state()


def test_total_limit_keeps_the_latest(tmp_path: Path):
    run = Run(**naming(tmp_path, total_limit=2, iteration=8))
    for _ in range(4):
        run.accelerator.save_state()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_10", "checkpoint_11"]
    run.accelerator.load_state()
    assert run.accelerator.project_configuration.iteration == 12


def test_there_has_to_be_a_folder(tmp_path: Path):
    run = Run()
    with pytest.raises(ArgumentError, match="output_dir"):
        run.accelerator.save_state()
    with pytest.raises(ArgumentError, match="input_dir"):
        run.accelerator.load_state()
    run.accelerator.project_configuration.automatic_checkpoint_naming = True
    with pytest.raises(ArgumentError, match="output_dir"):
        run.accelerator.save_state()
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StateError, match="a checkpoint's folder"):
            run.accelerator.load_state(folder)
    with pytest.raises(StateError, match="a checkpoint's folder"):
        Run(**naming(tmp_path)).accelerator.load_state()


def test_saving_again_replaces_but_keeps_what_others_put_there(tmp_path: Path):
    run = Run()
    (tmp_path / "events.txt").write_text("of another tool")
    run.accelerator.save_state(tmp_path)
    run.epoch(run.loader)
    run.accelerator.save_state(tmp_path)
    expected = run.weights()
    again = Run()
    again.accelerator.load_state(tmp_path)
    assert again.weights() == expected
    assert (tmp_path / "events.txt").read_text() == "of another tool"


# --- what does not fit ---


def all_of(run: Run) -> list[Any]:
    window = [window.state_dict() for window in run.accelerator._counting.windows.all]
    return [
        run.weights(),
        run.optimizer.state_dict(),
        run.scheduler.state_dict(),
        run.loader.state_dict(),
        window,
        torch.get_rng_state().tolist(),
        random.getstate(),
    ]


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_optimizer(path: Path) -> None:
    torch.save(torch.optim.SGD([torch.zeros(1) for _ in range(4)]).state_dict(), path)


def of_another_scheduler(path: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    torch.save(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3).state_dict(), path)


def of_fewer_groups(path: Path) -> None:
    torch.save(torch.optim.Adam([torch.zeros(1)]).state_dict(), path)


def of_other_shapes(path: Path) -> None:
    state = torch.load(path)
    state["state"][0]["exp_avg"] = torch.zeros(2, 2)
    torch.save(state, path)


def of_another_window(path: Path) -> None:
    state = torch.load(path)
    state["windows"][0]["pending"]["gradients"][0] = torch.zeros(2)
    torch.save(state, path)


def without_moments(path: Path) -> None:
    state = torch.load(path)
    del state["state"]
    torch.save(state, path)


def without_a_tally(path: Path) -> None:
    state = torch.load(path)
    del state["windows"][0]["pending"]["tally"]
    torch.save(state, path)


def with_half_a_term(path: Path) -> None:
    state = torch.load(path)
    for term in state["windows"][0]["pending"]["tally"].values():
        term["losses"].pop()
    torch.save(state, path)


def nothing(path: Path) -> None:
    torch.save({}, path)


def a_list(path: Path) -> None:
    torch.save([1, 2], path)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{
        f"{damage.__name__} of {name}": (name, damage)
        for name in (
            "optimizer.bin",
            "scheduler.bin",
            "sampler.bin",
            "window_0.bin",
            "random_states_0.pkl",
            "custom_checkpoint_0.pkl",
        )
        for damage in (half, Path.unlink, a_list)
        if (name, damage) not in (("window_0.bin", Path.unlink), ("custom_checkpoint_0.pkl", a_list))
    },
    "half of the weights": ("model.safetensors", half),
    "no weights": ("model.safetensors", Path.unlink),
    "foreign optimizer": ("optimizer.bin", of_another_optimizer),
    "fewer groups": ("optimizer.bin", of_fewer_groups),
    "other shapes": ("optimizer.bin", of_other_shapes),
    "no moments": ("optimizer.bin", without_moments),
    "empty scheduler": ("scheduler.bin", nothing),
    "no tally": ("window_0.bin", without_a_tally),
    "half a term": ("window_0.bin", with_half_a_term),
    "foreign scheduler": ("scheduler.bin", of_another_scheduler),
    "foreign window": ("window_0.bin", of_another_window),
}


class Counter:
    value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_changes_nothing(tmp_path: Path, damage: str):
    run = Run()
    run.accelerator.register_for_checkpointing(counter := Counter())
    run.epoch(run.loader, 6)
    run.accelerator.save_state(tmp_path / "checkpoint")
    name, spoil = DAMAGES[damage]
    spoil(tmp_path / "checkpoint" / name)
    run.epoch(run.loader, 7)
    counter.value = 1
    before = all_of(run)
    with pytest.raises(StateError, match="To fix it"):
        run.accelerator.load_state(tmp_path / "checkpoint")
    assert repr(all_of(run)) == repr(before)
    assert counter.value == 1


class TwoWindows:
    """Two models with a window each, of three micro-batches."""

    def __init__(self) -> None:
        self.accelerator = build(gradient_accumulation_steps=3)
        torch.manual_seed(0)
        models: list[Any] = [nn.Linear(2, 1).double(), nn.Linear(3, 1).double()]
        optimizers: list[Any] = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        *prepared, self.first, self.second = self.accelerator.prepare(*models, *optimizers)
        self.models = prepared

    def train(self, start: int, stop: int) -> list[Tensor]:
        inputs = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for x in inputs[start:stop]:
            for model, optimizer, part in zip(self.models, (self.first, self.second), x.split([2, 3], 1), strict=True):
                with self.accelerator.accumulate(model):
                    self.accelerator.backward(model(part).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
        return [param.detach().clone() for model in self.models for param in model.parameters()]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_windows_of_their_own_go_on_each(tmp_path: Path, stop: int):
    """In a process in which nothing has been accumulated yet, so that there are no windows."""
    expected = TwoWindows().train(0, 6)
    begun = TwoWindows()
    begun.train(0, stop)
    begun.accelerator.save_state(tmp_path)
    resumed = TwoWindows()
    resumed.accelerator.load_state(tmp_path)
    assert all(map(torch.equal, resumed.train(stop, 6), expected))


def test_one_window_that_does_not_fit_leaves_the_others_alone(tmp_path: Path):
    run = TwoWindows()
    run.train(0, 2)
    run.accelerator.save_state(tmp_path)
    path = tmp_path / "window_0.bin"
    state = torch.load(path)
    state["windows"][1]["pending"]["gradients"][0] = torch.zeros(2)
    torch.save(state, path)
    run.train(2, 5)
    before = repr(run.accelerator._counting.state_dict())
    with pytest.raises(StateError, match="other shapes"):
        run.accelerator.load_state(tmp_path)
    assert repr(run.accelerator._counting.state_dict()) == before


def test_a_window_that_the_checkpoint_has_not_is_given_up(tmp_path: Path):
    fresh = TwoWindows()
    fresh.accelerator.save_state(tmp_path)
    expected = fresh.train(0, 6)
    run = TwoWindows()
    run.train(0, 2)
    run.accelerator.load_state(tmp_path)
    assert all(map(torch.equal, run.train(0, 6), expected))


def test_another_model_is_refused(tmp_path: Path):
    run = Run()
    run.accelerator.save_state(tmp_path)
    for model in (nn.Linear(3, 5), nn.Sequential(nn.Linear(3, 5), nn.Dropout(), nn.Linear(5, 2)), nn.Identity()):
        accelerator = build()
        model = accelerator.prepare(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(StateError, match="load_state"):
            accelerator.load_state(tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_the_middle_of_a_micro_batch_nothing_is_saved(tmp_path: Path):
    run = Run()
    with (
        pytest.raises(RuntimeError, match="backward or update is still to come"),
        run.accelerator.accumulate(run.model),
    ):
        run.accelerator.save_state(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("stop", [4, 6])  # in the last micro-batch of a window, and in one that is not the last
def test_at_the_end_of_a_block_is_as_good_as_after_it(tmp_path: Path, stop: int):
    expected = straight(0, tmp_path, stop)
    torch.manual_seed(0)
    run = Run()
    for index, (x, y) in enumerate(run.loader, start=1):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(((run.model(x) - y) ** 2).mean())
            run.optimizer.step()
            run.scheduler.step()
            if index == stop:
                run.accelerator.save_state(str(tmp_path / "checkpoint"))
            run.optimizer.zero_grad()
    run.epoch(run.loader)
    assert run.weights() == expected  # saving disturbed nothing
    assert resumed(99, tmp_path, stop) == expected


def loads_what_is_damaged_for_one(folder: Path) -> str:
    run = Run()
    run.accelerator.save_state(folder / "checkpoint")
    before = run.weights()
    if run.accelerator.is_main_process:
        half(folder / "checkpoint" / "random_states_1.pkl")
    run.accelerator.wait_for_everyone()
    run.epoch(run.loader)
    moved = run.weights()
    assert before != moved
    try:
        run.accelerator.load_state(folder / "checkpoint")
    except (StateError, PeerError) as error:
        assert run.weights() == moved
        return type(error).__name__
    return ""


def saves_on_the_main_process(folder: Path) -> tuple[list[float], list[str], str]:
    run = Run()
    accelerator = run.accelerator
    accelerator._attendance.patience_s = 0.2
    batches = iter(run.loader)
    run.epoch([next(batches) for _ in range(3)])
    refused = ""
    try:
        if accelerator.is_main_process:
            accelerator.save_state(str(folder / "refused"))
    except WindowError as error:
        refused = str(error)
    run.epoch([next(batches)])
    if accelerator.is_main_process:
        accelerator.save_state(str(folder / "alone"))
    accelerator._attendance.patience_s = 20.0
    accelerator.save_state(str(folder / "together"))
    run.epoch(batches)
    return run.weights(), sorted(path.name for path in folder.iterdir()), refused


def goes_on_from_the_main_process_s(folder: Path, name: str) -> list[float]:
    torch.manual_seed(99)
    run = Run()
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    run.accelerator.load_state(str(folder / name))
    run.epoch(run.accelerator.skip_first_batches(run.loader, 4))
    return run.weights()


def test_the_main_process_may_save_alone_after_an_update(ranks: Any, tmp_path: Path):
    first, second = ranks(2, timeout_s=30.0).run(saves_on_the_main_process, tmp_path)
    assert first[0] == second[0]
    assert first[1] == second[1] == ["alone", "together"]
    assert "in the middle of a window" in first[2]
    assert not second[2]
    assert (tmp_path / "together" / "random_states_1.pkl").exists()
    assert not (tmp_path / "alone" / "random_states_1.pkl").exists()
    # Without dropout, nothing depends on the random states that are missing.
    ends = {name: ranks(2).run(goes_on_from_the_main_process_s, tmp_path, name) for name in ("alone", "together")}
    assert ends["alone"] == ends["together"]


def test_who_comes_late_finds_a_checkpoint_and_no_deadlock(ranks: Any, tmp_path: Path):
    assert ranks(2, timeout_s=30.0).run(comes_late, tmp_path) == [["alone", "together"]] * 2


def comes_late(folder: Path) -> list[str]:
    accelerator = Run().accelerator
    accelerator._attendance.patience_s = 0.2
    if not accelerator.is_main_process:
        while not (folder / "alone").exists():
            time.sleep(0.01)
    accelerator.save_state(str(folder / "alone"))
    accelerator._attendance.patience_s = 20.0
    accelerator.save_state(str(folder / "together"))
    return sorted(path.name for path in folder.iterdir())


def test_an_error_on_one_rank_is_one_on_all(ranks: Any, tmp_path: Path):
    assert ranks(2).run(loads_what_is_damaged_for_one, tmp_path) == ["PeerError", "StateError"]


def cannot_save(folder: Path) -> str:
    run = Run()
    run.accelerator.register_for_checkpointing(counter := Counter())
    counter.value = (number for number in ())  # nothing that a file can hold
    try:
        run.accelerator.save_state(folder / "checkpoint")
    except Exception as error:
        return type(error).__name__
    return ""


def test_what_cannot_be_saved_leaves_nothing_and_hangs_nobody(ranks: Any, tmp_path: Path):
    first, second = ranks(2).run(cannot_save, tmp_path)
    assert first not in ("", "PeerError")
    assert second == "PeerError"
    assert list(tmp_path.iterdir()) == []


class Unwilling(Counter):
    """What refuses to be loaded on the second rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.rank == 1:
            raise KeyError("a key of my own")


def fails_on_one_rank(folder: Path, where: str) -> str:
    """What a rank hears of an error on another one, and that they can go on together afterwards."""
    is_saving = where.startswith("save")
    rank = dist.get_rank()
    own = folder / str(rank) if where == "save, a folder that is there" else folder
    run = Run(**naming(own, total_limit=1))
    accelerator = run.accelerator
    accelerator.project_configuration.iteration = 5
    if where == "load, an object":
        accelerator.register_for_checkpointing(Unwilling(rank))
    if where == "load, a hook":
        accelerator.register_load_state_pre_hook(lambda *_: 1 // rank)
    if not is_saving:
        accelerator.save_state()
    elif rank == 0 and where == "save, a folder that is there":
        (own / "checkpoints" / "checkpoint_5").mkdir(parents=True)
    elif rank == 0 and where == "save, an old one that stays":
        (own / "checkpoints").mkdir(parents=True)
        (own / "checkpoints" / "checkpoint_1").write_text("not a folder, which cannot be removed like one")
    elif where == "save, a loader":
        run.loader.state_dict = lambda: {"of": 1 // rank}
    try:
        accelerator.save_state() if is_saving else accelerator.load_state()
    except Exception as error:
        assert int(accelerator.gather(torch.tensor([rank])).sum()) == 1
        return type(error).__name__
    return ""


@pytest.mark.parametrize(
    ("where", "rank", "error"),
    [
        ("load, an object", 1, "KeyError"),
        ("load, a hook", 0, "ZeroDivisionError"),
        ("save, a folder that is there", 0, "ArgumentError"),
        ("save, an old one that stays", 0, "NotADirectoryError"),
        ("save, a loader", 0, "ZeroDivisionError"),
    ],
)
def test_nobody_waits_for_a_rank_with_an_error(ranks: Any, tmp_path: Path, where: str, rank: int, error: str):
    heard = ["PeerError", "PeerError"]
    heard[rank] = error
    assert ranks(2, timeout_s=20.0).run(fails_on_one_rank, tmp_path, where) == heard


# --- parts ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(()))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch"])
def test_tied_weights_stay_tied(tmp_path: Path, safe: bool):
    accelerator = build()
    model = accelerator.prepare(Tied())
    expected = model.head.weight.detach().clone()
    accelerator.save_state(tmp_path, safe_serialization=safe)
    with torch.no_grad():
        model.head.weight.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(model.embedding.weight, expected)
    assert model.head.weight is model.embedding.weight


def test_several_of_everything(tmp_path: Path):
    def both() -> tuple[Any, ...]:
        accelerator = build()
        models: list[Any] = [nn.Linear(2, 1), nn.Linear(3, 1)]
        optimizers: list[Any] = [torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5) for model in models]
        return accelerator, *accelerator.prepare(*models, *optimizers)

    accelerator, a, b, *optimizers = both()
    for model, optimizer, size in ((a, optimizers[0], 2), (b, optimizers[1], 3)):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, size)).sum())
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(tmp_path)
    assert {"model.safetensors", "model_1.safetensors", "optimizer_1.bin"} <= {path.name for path in tmp_path.iterdir()}
    accelerator, c, d, *others = both()
    accelerator.load_state(tmp_path)
    assert torch.equal(a.weight, c.weight)
    assert torch.equal(b.weight, d.weight)
    for one, other in zip(optimizers, others, strict=True):
        assert repr(one.state_dict()) == repr(other.state_dict())


def test_objects_of_ones_own(tmp_path: Path):
    run = Run()
    counters = Counter(), Counter()
    run.accelerator.register_for_checkpointing(*counters)
    counters[0].value, counters[1].value = 3, 4
    run.accelerator.save_state(tmp_path)
    counters[0].value = counters[1].value = 0
    run.accelerator.load_state(tmp_path)
    assert [counter.value for counter in counters] == [3, 4]
    with pytest.raises(ValueError, match=r"\['int', 'str'\].*To fix it"):
        run.accelerator.register_for_checkpointing(counters[0], 1, "two")


def test_hooks_can_take_over(tmp_path: Path):
    run = Run()
    seen: list[Any] = []

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        torch.save(weights.pop(), Path(folder) / "own.bin")
        seen.append(len(models))

    def load(models: list[Any], folder: str) -> None:
        models.pop().load_state_dict(torch.load(Path(folder) / "own.bin"))

    hooks = run.accelerator.register_save_state_pre_hook(save), run.accelerator.register_load_state_pre_hook(load)
    run.accelerator.save_state(tmp_path / "own")
    assert not (tmp_path / "own" / "model.safetensors").exists()
    expected = run.weights()
    run.epoch(run.loader)
    run.accelerator.load_state(tmp_path / "own")
    assert run.weights() == expected
    for hook in hooks:
        hook.remove()
    run.accelerator.save_state(tmp_path / "usual")
    run.accelerator.load_state(tmp_path / "usual")
    assert (tmp_path / "usual" / "model.safetensors").exists()
    assert seen == [1]


def saves_by_hook(folder: Path) -> list[str]:
    run = Run()

    def hook(models: list[Any], weights: list[Any], place: str) -> None:
        Path(place, f"by_{run.accelerator.process_index}.txt").write_text("mine")
        run.accelerator.wait_for_everyone()

    run.accelerator.register_save_state_pre_hook(hook)
    run.accelerator.save_state(folder / "checkpoint")
    return sorted(path.name for path in (folder / "checkpoint").glob("by_*"))


def test_hooks_run_on_all_ranks(ranks: Any, tmp_path: Path):
    assert ranks(2).run(saves_by_hook, tmp_path) == [["by_0.txt", "by_1.txt"]] * 2


def draws() -> list[Any]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(2).tolist()]


def restores_random_states(folder: Path) -> tuple[list[Any], list[Any]]:
    seed = 3 + (dist.get_rank() if dist.is_initialized() else 0)
    run = Run()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    draws()  # NumPy's normal distribution has a second number in hand now
    run.accelerator.save_state(folder / "checkpoint")
    expected = draws()
    draws()
    run.accelerator.load_state(folder / "checkpoint")
    return expected, draws()


def test_random_states_come_back(ranks: Any, tmp_path: Path):
    expected, found = restores_random_states(tmp_path)
    assert found == expected
    (first, first_found), (second, second_found) = ranks(2).run(restores_random_states, tmp_path)
    assert (first_found, second_found) == (first, second)
    assert first != second


# --- weights alone ---


def read(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        part = load_file(folder / name)
        assert {index["weight_map"][key] for key in part} == {name}
        found |= part
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in found.values())
    return found


def test_a_model_in_one_file(tmp_path: Path):
    accelerator, model = build(), nn.Linear(4, 4)
    accelerator.save_model(model, tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "new" / "folder" / "model.safetensors")["weight"], model.weight)
    accelerator.save_model(model, tmp_path, safe_serialization=False)
    assert torch.equal(torch.load(tmp_path / "pytorch_model.bin")["weight"], model.weight)


def test_a_model_in_several_files(tmp_path: Path):
    accelerator = build()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    for limit, num_files in (("300B", 3), (1, 6), ("1KB", 1), ("0.5KB", None), ("64B", 6)):
        if num_files is None:
            with pytest.raises(ArgumentError, match="max_shard_size"):
                accelerator.save_model(model, tmp_path, max_shard_size=limit)
            continue
        accelerator.save_model(model, tmp_path, max_shard_size=limit)
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert len(files) == num_files, limit  # those of the save before are gone
        assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
        found = load_file(tmp_path / "model.safetensors") if num_files == 1 else read(tmp_path)
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.items())


@pytest.mark.parametrize("limit", [0, -1, 1.5, "many", "", None, True], ids=repr)
def test_no_size_is_refused(tmp_path: Path, limit: Any):
    with pytest.raises(ArgumentError, match="max_shard_size"):
        build().save_model(nn.Linear(1, 1), tmp_path / "new", max_shard_size=limit)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("limit", ["10GB", "20KB"])
def test_transformers_reads_what_was_saved(tmp_path: Path, limit: str):
    from transformers import GPT2Config, GPT2LMHeadModel

    accelerator = build()
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = accelerator.prepare(GPT2LMHeadModel(config)).eval()
    config.save_pretrained(tmp_path)
    accelerator.save_model(model, tmp_path, max_shard_size=limit)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (limit == "20KB")
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(10).view(1, 10)
    assert torch.equal(again(ids).logits, model(ids).logits)
    accelerator.save_state(tmp_path / "checkpoint")  # its head is tied to its embedding
    with torch.no_grad():
        model.lm_head.weight.zero_()
    accelerator.load_state(tmp_path / "checkpoint")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_object_is_saved_alone(tmp_path: Path):
    accelerator = build()
    accelerator.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    assert torch.load(tmp_path / "x.bin")["x"].tolist() == [1.0, 1.0]
    accelerator.save({"x": torch.ones(2)}, tmp_path / "x.safetensors", safe_serialization=True)
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1.0, 1.0]


def saves_on_each_node(folder: Path) -> bool:
    accelerator = build(project_config=ProjectConfiguration(save_on_each_node=True))
    accelerator.save({"rank": accelerator.process_index}, folder / "x.bin")
    accelerator.save_state(folder / "checkpoint")
    accelerator.wait_for_everyone()
    return torch.load(folder / "x.bin")["rank"] == 0


def test_one_process_of_each_machine_writes(ranks: Any, tmp_path: Path):
    assert ranks(2).run(saves_on_each_node, tmp_path) == [True, True]


def hooked(package: str, settings: dict[str, Any], folder: Path) -> list[str]:
    """What hooks are given to save and to load, of a model that is in DistributedDataParallel."""
    with entered(package) as door:
        plugin = door.utils.GradientAccumulationPlugin(num_steps=2, **settings)
        handlers = [] if settings else [door.DistributedDataParallelKwargs()]
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_plugin=plugin, kwargs_handlers=handlers)
        model = accelerator.prepare(nn.Linear(2, 1))
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        seen: list[str] = []
        accelerator.register_save_state_pre_hook(lambda models, *_: seen.extend(type(m).__name__ for m in models))
        accelerator.register_load_state_pre_hook(lambda models, *_: seen.extend(type(m).__name__ for m in models))
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()  # the original's ranks do not wait for the one that writes
        accelerator.load_state(str(folder))
        return seen


def test_hooks_get_models_without_their_wrappers(ranks: Any, tmp_path: Path):
    runs: list[tuple[str, dict[str, Any]]] = [(ORIGINAL, {}), (OURS, {}), (OURS, {"original": True})]
    for number, (package, settings) in enumerate(runs):
        assert ranks(2).run(hooked, package, settings, tmp_path / str(number)) == [["Linear", "Linear"]] * 2


@pytest.mark.parametrize("name", ["window_0.bin", "model.safetensors", "random_states_0.pkl"])
def test_a_checkpoint_that_has_lost_a_file_is_refused(tmp_path: Path, name: str):
    accelerator = importlib.import_module(OURS).Accelerator(gradient_accumulation_steps=2)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "state"))
    (tmp_path / "state" / name).unlink()
    with torch.no_grad():
        model.weight.fill_(3.0)
    with pytest.raises(StateError, match=f"given no {name}; expected all files"):
        accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(model.weight, torch.full((1, 2), 3.0))
