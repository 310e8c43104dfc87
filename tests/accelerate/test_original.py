"""`GradientAccumulationPlugin(original=True)`: the same script ends at the bits that it has under `accelerate`.

There is a script for each difference that "Compatibility" lists. Without the switch its weights are other ones, or the
script is refused: so none of these tests could pass for nothing.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.accelerate.counting import WindowCounting
from macrobatch.core.precision import Fp16
from macrobatch.errors import ArgumentError, LossError, MacrobatchError, StateError
from macrobatch.testing.pool import RankError
from tests.accelerate.doors import BOTH, ORIGINAL, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")


class Run:
    """What a script needs, from either package; its weights are in `modules`."""

    def __init__(self, door: Any, settings: dict[str, Any]) -> None:
        self.door = door
        self.settings = settings
        self.modules: list[nn.Module] = []
        torch.manual_seed(0)

    def accelerator(self, num_steps: int = 4, **kwargs: Any) -> Any:
        settings = dict(self.settings)
        if "reads_ahead" in settings:
            kwargs["dataloader_config"] = self.door.DataLoaderConfiguration(reads_ahead=settings.pop("reads_ahead"))
        plugin = self.door.utils.GradientAccumulationPlugin(num_steps=num_steps, **settings)
        return self.door.Accelerator(cpu=True, gradient_accumulation_plugin=plugin, **kwargs)

    def module(self, width: int = 6, dtype: torch.dtype = torch.float32) -> nn.Module:
        self.modules.append(nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype))
        return self.modules[-1]

    def prepared(self, accelerator: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        module = self.module(dtype=dtype)
        return accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))

    def weights(self) -> Tensor:
        return torch.cat([param.detach().flatten() for module in self.modules for param in module.parameters()])


def loader(num_samples: int, batch_size: int = 2) -> Any:
    data = torch.randn(num_samples, 6, generator=torch.Generator().manual_seed(num_samples))
    return DataLoader(TensorDataset(data), batch_size=batch_size)


def micro_step(accelerator: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


# --- the scripts -----------------------------------------------------------------------------------------------------


def short_window(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    data = accelerator.prepare(loader(23))
    for _ in range(2):
        for (x,) in data:
            micro_step(accelerator, model, optimizer, x)


def unequal_ranks(run: Run) -> None:
    config = run.door.DataLoaderConfiguration(even_batches=False)
    accelerator = run.accelerator(2, dataloader_config=config)
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(14, 4)):
        micro_step(accelerator, model, optimizer, x)


def without_accumulate(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(16)):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def in_16_bits(run: Run) -> None:
    accelerator = run.accelerator(8)
    model, optimizer = run.prepared(accelerator, torch.bfloat16)
    for (x,) in accelerator.prepare(loader(64)):
        micro_step(accelerator, model, optimizer, x.bfloat16())


def clipped_in_the_window(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(16)):
        with accelerator.accumulate(model):
            accelerator.backward(10 * model(x).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            accelerator.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


def rounded(run: Run) -> None:
    """Where both are right, but for the last digits."""
    accelerator = run.accelerator(3)
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(24)):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()


def two_forwards(run: Run) -> None:
    accelerator = run.accelerator(2)
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(32)):
        with accelerator.accumulate(model):
            losses = [model(x).square().mean(), model(x + 1).square().mean()]
            for loss in losses:
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def zipped(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    short, long = accelerator.prepare(loader(12), loader(20))
    for _ in range(2):
        for (x,), _ in zip(short, long, strict=False):
            micro_step(accelerator, model, optimizer, x)


def second_accelerator(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    run.door.Accelerator(cpu=True)
    for (x,) in accelerator.prepare(loader(16)):
        micro_step(accelerator, model, optimizer, x)


def evaluation(run: Run, *, num_batches: int, is_kept: bool) -> None:
    """After the third micro-batch, an evaluation of two batches is left by `break`."""
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    data = accelerator.prepare(loader(28))
    kept = []
    for _ in range(2):
        for index, (x,) in enumerate(data):
            micro_step(accelerator, model, optimizer, x)
            if index == 2:
                evaluated = run.door.data_loader.prepare_data_loader(
                    loader(num_batches * 2 * accelerator.num_processes)
                )
                for number, _ in enumerate(evaluated, start=1):
                    if number == 2:
                        break
                kept += [evaluated] if is_kept else []
                del evaluated


def evaluation_left_early(run: Run) -> None:
    evaluation(run, num_batches=4, is_kept=True)


def evaluation_left_at_its_end(run: Run) -> None:
    evaluation(run, num_batches=2, is_kept=True)


def evaluation_collected(run: Run) -> None:
    evaluation(run, num_batches=2, is_kept=False)


def a_batch_taken_before(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    one, data = accelerator.prepare(loader(2 * accelerator.num_processes), loader(20))
    next(iter(one))
    for (x,) in data:
        micro_step(accelerator, model, optimizer, x)


def cut_up(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(16, 4)):
        for piece in x:
            micro_step(accelerator, model, optimizer, piece)


def changed_steps(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for index, (x,) in enumerate(accelerator.prepare(loader(40))):
        if index in (6, 12):
            accelerator.gradient_accumulation_steps = 3 if index == 6 else 5
        micro_step(accelerator, model, optimizer, x)


def left_by_continue(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for index, (x,) in enumerate(accelerator.prepare(loader(24 * accelerator.num_processes))):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if index == 3:
                continue
            optimizer.step()
            optimizer.zero_grad()


def zeroed_at_the_top(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(24)):
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(model(x).square().mean())
            optimizer.step()


def left_by_break(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    data = accelerator.prepare(loader(20 * accelerator.num_processes))
    for _ in range(2):
        for index, (x,) in enumerate(data):
            if index == 6:
                break
            micro_step(accelerator, model, optimizer, x)
        optimizer.zero_grad()


def two_steps(run: Run) -> None:
    accelerator = run.accelerator(2)
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(16)):
        with accelerator.accumulate(model):
            for _ in range(2):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()


def adversarial(run: Run) -> None:
    accelerator = run.accelerator(2)
    modules = run.module(), run.module(1)
    generator, critic, *optimizers = accelerator.prepare(
        *modules, *(torch.optim.SGD(module.parameters(), lr=0.1) for module in modules)
    )
    for (x,) in accelerator.prepare(loader(28 * accelerator.num_processes)):
        with torch.no_grad():
            fake = generator(x)
        with accelerator.accumulate(critic):
            accelerator.backward(critic(fake).mean())
            optimizers[1].step()
            optimizers[1].zero_grad()
        with accelerator.accumulate(generator):
            accelerator.backward(-critic(generator(x)).mean())
            optimizers[0].step()
            optimizers[0].zero_grad()


def not_the_accelerator_s_backward(run: Run) -> None:
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(16)):
        with accelerator.accumulate(model):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def bare_tensor(run: Run) -> None:
    accelerator = run.accelerator(2)
    weight = torch.zeros(6, 1, requires_grad=True)
    model = nn.Module()
    model.weight = nn.Parameter(weight)  # only for the comparison
    run.modules.append(model)
    bare, optimizer, data = accelerator.prepare(weight, torch.optim.SGD([weight], lr=0.1), loader(16))
    for (x,) in data:
        with accelerator.accumulate(bare):
            accelerator.backward((x @ bare - 1).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    model.weight.data.copy_(weight.detach())


def adjusted_scheduler(run: Run) -> None:
    run.settings = {**run.settings, "adjust_scheduler": True}
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.9))
    for (x,) in accelerator.prepare(loader(32)):
        micro_step(accelerator, model, optimizer, x)
        scheduler.step()


def random_in_collate(run: Run) -> None:
    def collate(samples: list[tuple[Tensor]]) -> Tensor:
        batch = torch.stack([x for (x,) in samples])
        return batch * torch.rand_like(batch).round()

    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    data = accelerator.prepare(DataLoader(loader(32).dataset, batch_size=2, collate_fn=collate))
    for x in data:
        micro_step(accelerator, model, optimizer, nn.functional.dropout(x))


Script = Callable[[Run], None]
SCRIPTS: dict[str, Script] = {
    script.__name__: script
    for script in (
        short_window,
        unequal_ranks,
        without_accumulate,
        in_16_bits,
        clipped_in_the_window,
        rounded,
        two_forwards,
        zipped,
        second_accelerator,
        evaluation_left_early,
        evaluation_left_at_its_end,
        evaluation_collected,
        a_batch_taken_before,
        cut_up,
        changed_steps,
        left_by_continue,
        zeroed_at_the_top,
        left_by_break,
        two_steps,
        adversarial,
        not_the_accelerator_s_backward,
        bare_tensor,
        adjusted_scheduler,
        random_in_collate,
    )
}
ON_RANKS_ONLY = {"unequal_ranks", "two_forwards", "bare_tensor"}
"""In one process, these do not differ."""


def trained(package: str, script: str, settings: dict[str, Any]) -> Tensor | str:
    """This rank's weights, or the name of the error that the script was refused with."""
    with entered(package) as door:
        run = Run(door, settings)
        try:
            (SCRIPTS | BESIDES)[script](run)
        except MacrobatchError as error:
            return type(error).__name__
        return run.weights()


def are_same(some: Tensor | str, others: Tensor | str) -> bool:
    return isinstance(some, Tensor) and isinstance(others, Tensor) and torch.equal(some, others)


ORIGINALLY = {"original": True}
quiet = pytest.mark.filterwarnings("ignore:optimizer.step", "ignore:Detected call of `lr_scheduler.step")


@quiet
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ON_RANKS_ONLY])
def test_same_bits_in_one_process(script: str):
    theirs = trained(ORIGINAL, script, {})
    assert are_same(theirs, trained(OURS, script, ORIGINALLY))
    assert not are_same(theirs, trained(OURS, script, {}))


@quiet
@pytest.mark.parametrize("script", SCRIPTS)
def test_same_bits_on_two_ranks(script: str, ranks: Any):
    theirs, ours = (
        ranks(2).run(trained, *arguments) for arguments in ((ORIGINAL, script, {}), (OURS, script, ORIGINALLY))
    )
    assert all(map(are_same, theirs, ours))


@quiet
@pytest.mark.parametrize("script", sorted(ON_RANKS_ONLY))
def test_other_bits_on_two_ranks_without_it(script: str, ranks: Any):
    theirs, ours = (ranks(2).run(trained, package, script, {}) for package in BOTH)
    assert not any(map(are_same, theirs, ours))


FINER: dict[str, dict[str, Any]] = {
    "short_window": {"normalize": "constant"},
    "unequal_ranks": {"normalize": "constant"},
    "without_accumulate": {"normalize": "constant"},
    "in_16_bits": {"widens": False},
    "zipped": {"sync_with_dataloader": False},
    "random_in_collate": {"reads_ahead": True},
}
"""For these, a switch of one difference alone does it, too; over ranks if they differ there only."""


@pytest.mark.parametrize("script", FINER)
def test_a_switch_of_one_difference(script: str, ranks: Any):
    runs = [(ORIGINAL, script, {}), (OURS, script, FINER[script])]
    theirs, ours = (ranks(2).run(trained, *run) if script in ON_RANKS_ONLY else [trained(*run)] for run in runs)
    assert all(map(are_same, theirs, ours))


# --- the page --------------------------------------------------------------------------------------------------------

ROWS = {
    "a short last window": ["short_window"],
    "ranks with different numbers of samples": ["unequal_ranks"],
    "without `accumulate`": ["without_accumulate"],
    "16-bit parameters": ["in_16_bits"],
    "clipping in a micro-batch": ["clipped_in_the_window"],
    "clipping, and": ["rounded"],
    "several backwards": ["two_forwards"],
    "`backward(loss, weight=n)`": [],  # no script of the original's has it
    "`gradient_accumulation_steps` and a plugin": ["test_a_plugin_alone_means_one_step"],
    "an explicit argument": ["test_the_environment_counts_without_an_argument"],
    "0, −3, 2.5": ["test_a_negated_loss_climbs"],
    "with `zip`": ["zipped"],
    "a second `Accelerator`": ["second_accelerator"],
    "an evaluation left by `break`": [
        "evaluation_left_early",
        "evaluation_left_at_its_end",
        "evaluation_collected",
        "a_batch_taken_before",
    ],
    "a loop that cuts": ["cut_up"],
    "another `gradient_accumulation_steps`": ["changed_steps"],
    "leaving the last micro-batch": ["left_by_continue"],
    "`zero_grad` inside": ["zeroed_at_the_top", "left_by_break"],
    "after `optimizer.step()`": ["two_steps"],
    "models named in blocks": ["adversarial"],
    "`loss.backward()`": ["not_the_accelerator_s_backward"],
}
"""Each row of the page's tables "Numbers" and "When a window ends", and what shows its switch."""


def rows_of(page: str, *headings: str) -> list[tuple[str, str]]:
    """Difference and switch of each row of the tables under these headings."""
    found: list[tuple[str, str]] = []
    for heading in headings:
        section = re.split(r"^#+ ", page.split(f"### {heading}\n", 1)[1], flags=re.MULTILINE)[0]
        lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        found += [(cells[0], cells[2] if len(cells) > 2 else "") for cells in lines[2:]]
    return found


def without_a_switch(rows: list[tuple[str, str]]) -> list[str]:
    return [difference for difference, switch in rows if not switch or switch.startswith("none")]


def test_every_difference_in_numbers_has_a_switch_that_is_shown():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    page = page.split("## macrobatch.colossalai")[0]
    rows = rows_of(page, "Numbers", "When a window ends")
    assert without_a_switch(rows) == []
    tests = (Path(__file__).parent / "test_switches.py").read_text(encoding="utf-8")
    for difference, switch in rows:
        (row,) = [row for row in ROWS if difference.startswith(row)]
        for shown in ROWS[row]:
            if shown in SCRIPTS:
                names = re.findall(r"`(\w+)=", switch)
                assert "original" in names
                assert shown not in FINER or set(FINER[shown]) <= set(names)
            else:
                assert f"def {shown}(" in tests
    assert len(rows) == len(ROWS)
    rows += rows_of(page, "Objects", "Ranks and data", "Checkpoints")
    assert without_a_switch(rows) == []
    assert without_a_switch([*rows, ("a difference", "none: no way back"), ("another", "")]) == [
        "a difference",
        "another",
    ]


# --- what a script may do besides ------------------------------------------------------------------------------------


def guarded(run: Run) -> None:
    """The guide's loop, with all that goes with it."""
    accelerator = run.accelerator(mixed_precision="bf16")
    model, optimizer = run.prepared(accelerator)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.9))
    for epoch in range(2):
        for (x,) in accelerator.prepare(loader(22)):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.gradient_accumulation_steps = 3 + epoch
    accelerator.free_memory()
    assert accelerator.step == 0


def by_hand(run: Run) -> None:
    """A loop that counts for itself, with `no_sync`, and says so by `sync_gradients`."""
    accelerator = run.accelerator()
    model, optimizer = run.prepared(accelerator)
    for index, (x,) in enumerate(accelerator.prepare(loader(16))):
        accelerator.sync_gradients = index % 2 == 1
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def reduced_each_time(run: Run) -> None:
    run.settings = {**run.settings, "sync_each_batch": True}
    short_window(run)


def with_a_closure(run: Run) -> None:
    accelerator = run.accelerator(1)
    model, optimizer = run.prepared(accelerator)
    for (x,) in accelerator.prepare(loader(8)):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()  # noqa: B023
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)


def own_optimizer(run: Run) -> None:
    """Neither the optimizer nor a second model is prepared."""
    accelerator = run.accelerator(2)
    model, extra = accelerator.prepare(run.module()), run.module()
    optimizer = torch.optim.SGD([*model.parameters(), *extra.parameters()], lr=0.1)
    for (x,) in accelerator.prepare(loader(16)):
        with accelerator.accumulate(model):
            accelerator.backward((model(x) + extra(x)).square().mean())
            if accelerator.sync_gradients:
                optimizer.step()
                optimizer.zero_grad()


def local_steps(run: Run) -> None:
    accelerator = run.accelerator(2)
    model, optimizer = run.prepared(accelerator)
    local = importlib.import_module(f"{run.door.__name__}.local_sgd")
    with local.LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4) as averaging:
        for (x,) in accelerator.prepare(loader(32)):
            micro_step(accelerator, model, optimizer, x)
            averaging.step()


BESIDES: dict[str, Script] = {
    script.__name__: script
    for script in (guarded, by_hand, reduced_each_time, with_a_closure, own_optimizer, local_steps)
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("script", BESIDES)
def test_what_else_a_script_does(script: str, num_ranks: int, ranks: Any):
    runs = [(ORIGINAL, script, {}), (OURS, script, ORIGINALLY)]
    theirs, ours = ([trained(*run)] if num_ranks == 1 else ranks(2).run(trained, *run) for run in runs)
    assert all(map(are_same, theirs, ours))


def stopped_in_a_window(package: str, folder: str, settings: dict[str, Any], is_stopped: bool) -> Tensor:
    weights = torch.empty(0)
    for part in (range(6), range(6, 16)) if is_stopped else (range(16),):
        with entered(package) as door:
            run = Run(door, settings)
            accelerator = run.accelerator()
            model, optimizer = run.prepared(accelerator)
            if part.start:
                accelerator.load_state(folder)
            for index in part:
                x = torch.randn(2, 6, generator=torch.Generator().manual_seed(index))
                micro_step(accelerator, model, optimizer, x)
            if part.stop == 6:
                accelerator.save_state(folder)
            weights = run.weights()
    return weights


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_checkpoint_in_a_window_loses_its_gradients(num_ranks: int, ranks: Any, tmp_path: Path):
    def go(*arguments: Any) -> Tensor:
        run = stopped_in_a_window
        return run(*arguments) if num_ranks == 1 else ranks(2).run(run, *arguments)[0]

    theirs = go(ORIGINAL, str(tmp_path / "theirs"), {}, True)
    assert torch.equal(go(OURS, str(tmp_path / "ours"), ORIGINALLY, True), theirs)
    assert not torch.equal(go(OURS, str(tmp_path / "exact"), {}, True), theirs)
    with pytest.raises((StateError, RankError), match="leave original=True out until that window has ended"):
        continued(OURS, tmp_path / "exact") if num_ranks == 1 else ranks(2).run(continued, OURS, tmp_path / "exact")


def continued(package: str, folder: Path) -> None:
    with entered(package) as door:
        run = Run(door, ORIGINALLY)
        accelerator = run.accelerator()
        run.prepared(accelerator)
        accelerator.load_state(str(folder))


def scaled(package: str, settings: dict[str, Any]) -> tuple[Tensor, list[float], list[bool]]:
    """Weights, learning rates and skips of two optimizers with one loss scaler; the first one's second step
    overflows. The scheduler's own optimizer is not prepared, so that it follows both."""
    with entered(package) as door:
        run = Run(door, settings)
        accelerator = run.accelerator(1)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        if package == OURS:  # where it is made with the accelerator, but on GPUs only
            counting = accelerator._counting
            counting._scaler = accelerator.scaler
            if isinstance(counting, WindowCounting):
                counting.windows._precision = lambda is_first: Fp16(
                    "cpu", accelerator.scaler if is_first else torch.amp.GradScaler("cpu", init_scale=4.0)
                )
        pairs = [run.prepared(accelerator) for _ in range(2)]
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(other, 0.5))
        other.step()
        rates, skips = [], []
        for index, (x,) in enumerate(accelerator.prepare(loader(16))):
            for number, (model, optimizer) in enumerate(pairs):
                factor = float("inf") if (number, index) == (0, 3) else 1.0
                with accelerator.accumulate(model):
                    accelerator.backward(factor * model(x).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
            skips.append(accelerator.optimizer_step_was_skipped)
        return run.weights(), rates, skips


def test_one_skipped_optimizer_holds_up_a_scheduler_of_two():
    theirs, ours, exact = (
        scaled(package, settings) for package, settings in ((ORIGINAL, {}), (OURS, ORIGINALLY), (OURS, {}))
    )
    assert torch.equal(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]
    assert theirs[2] == [index == 3 for index in range(8)]
    assert theirs[1][3] == theirs[1][2]
    assert exact[2] == theirs[2]
    assert exact[1][3] < exact[1][2]  # the control: the other one was not skipped


def joined(package: str) -> Tensor:
    """Two batches on the first rank, and one on the second, under torch's own names or those of a package."""
    with entered(package) as door:
        run = Run(door, ORIGINALLY)
        accelerator = run.accelerator(1, dataloader_config=door.DataLoaderConfiguration(even_batches=True))
        model, optimizer = run.prepared(accelerator)
        data = accelerator.prepare(loader(12, 4))
        with accelerator.join_uneven_inputs([model], even_batches=False):
            for (x,) in data:
                micro_step(accelerator, model, optimizer, x)
        return run.weights()


def joined_by_hand() -> Tensor:
    torch.manual_seed(0)
    run = Run(None, {})
    module = run.module()
    model = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rank = torch.distributed.get_rank()
    with Join([model]):
        for index, (x,) in enumerate(loader(12, 4)):
            if index % 2 == rank:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    return run.weights()


def test_ranks_without_data_are_shadowed_by_ddp(ranks: Any):
    assert all(map(are_same, ranks(2).run(joined, OURS), ranks(2).run(joined_by_hand)))


def sharded(is_sharded: bool) -> tuple[Tensor, bool]:
    with entered(OURS) as door:
        run = Run(door, ORIGINALLY)
        plugin = door.utils.FullyShardedDataParallelPlugin(fsdp_version=2) if is_sharded else None
        accelerator = run.accelerator(fsdp_plugin=plugin)
        model, optimizer = run.prepared(accelerator)
        for (x,) in accelerator.prepare(loader(22)):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:  # before, FSDP2 holds its sums elsewhere
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        params = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        found = isinstance(next(model.parameters()), DTensor)
        return torch.cat([param.detach().flatten() for param in params]), found


def test_a_sharded_model_is_counted_as_a_replicated_one(ranks: Any):
    (whole, is_whole_sharded), (shards, is_sharded) = (ranks(2).run(sharded, each)[0] for each in (False, True))
    assert (is_whole_sharded, is_sharded) == (False, True)
    # The same sums in another order: a few roundings of 6e-8 in each of three updates.
    torch.testing.assert_close(shards, whole, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_be_given_with():
    with entered(OURS) as door:
        plugin = door.utils.GradientAccumulationPlugin
        for others in ({"normalize": "exact"}, {"widens": True}):
            with pytest.raises(ArgumentError, match="leave the others out"):
                plugin(original=True, **others)
        assert vars(plugin(original=True)) == vars(plugin(original=True, normalize="constant", widens=False))
        run = Run(door, ORIGINALLY)
        accelerator = run.accelerator()
        model, _ = run.prepared(accelerator)
        with pytest.raises(LossError, match="leave out one of them"):
            accelerator.backward(model(torch.ones(1, 6)).sum(), weight=1)
