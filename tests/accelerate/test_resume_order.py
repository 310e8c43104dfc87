"""A shuffled epoch that was stopped goes on where it was: every sample once, in the order of an uninterrupted run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from tests.accelerate.doors import ORIGINAL, OURS, entered

SIZE = 22

pytestmark = pytest.mark.xdist_group("ranks")


@contextmanager
def door(package: str = OURS, **options: Any) -> Generator[Any]:
    """An accelerator in this process, or for the ranks that it is one of, in a random state of its own."""
    torch.seed()
    with entered(package) as found:
        yield found.Accelerator(cpu=True, dataloader_config=found.utils.DataLoaderConfiguration(**options))


def loader_of(kind: str) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(SIZE))
    if kind == "generator":
        return DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator())
    if kind == "replacement":
        return DataLoader(data, batch_size=2, sampler=RandomSampler(data, replacement=True, num_samples=SIZE))
    if kind == "batches inside":
        batches = BatchSampler(RandomSampler(data), 2, drop_last=False)
        return DataLoader(data, sampler=batches, batch_size=None)
    if kind == "elements":
        return DataLoader(data, batch_size=None, shuffle=True)
    return DataLoader(data, batch_size=2, shuffle=True, num_workers=kind == "worker")


KINDS = ["plain", "generator", "seeded", "replacement", "batches inside", "elements", "dispatched", "split"]
"""Ways of shuffling. "elements" are not batched, and what fills up the last of them is not known as such."""
UNIQUE = [kind for kind in KINDS if kind not in ("replacement", "elements")]


def options_of(kind: str) -> dict[str, Any]:
    return {
        "use_seedable_sampler": kind == "seeded",
        "dispatch_batches": True if kind == "dispatched" else None,
        "split_batches": kind == "split",
    }


def rows(batch: Any) -> list[int]:
    return torch.atleast_1d(batch[0]).tolist()


def interrupted(
    kind: str, epoch: int, stop: int, folder: Path, package: str = OURS
) -> tuple[list[list[int]], list[list[int]]]:
    """This rank's batches of one epoch and of the next; a checkpoint is saved after `stop` batches of the first."""
    with door(package, **options_of(kind)) as accelerator:
        torch.manual_seed(3)  # not what the restarted run has
        loader = accelerator.prepare(loader_of(kind))
        for _ in range(epoch):
            list(loader)
        found = []
        for index, batch in enumerate(loader, start=1):
            found.append(rows(batch))
            if index == stop:
                accelerator.save_state(str(folder / "checkpoint"))
        return found, [rows(batch) for batch in loader]


def continued(
    kind: str, stop: int | None, folder: Path, package: str = OURS
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """This rank's batches of the rest and of the next epoch, and what `gather_for_metrics` makes of the rest."""
    with door(package, **options_of(kind)) as accelerator:
        loader = accelerator.prepare(loader_of(kind))
        accelerator.load_state(str(folder / "checkpoint"))
        skipping = accelerator.skip_first_batches(loader, *([] if stop is None else [stop]))
        found, gathered = [], []
        num_batches = len(skipping)
        for batch in skipping:
            found.append(rows(batch))
            gathered += accelerator.gather_for_metrics(torch.atleast_1d(batch[0])).tolist()
        assert num_batches == len(found) or kind == "dispatched"
        return found, [rows(batch) for batch in loader], gathered


@pytest.mark.better("W9")
@pytest.mark.better("W8")
@pytest.mark.parametrize("kind", ["plain", "seeded"])
def test_the_original_repeats_and_loses_samples(kind: str, tmp_path: Path):
    whole, _ = interrupted(kind, 1, 4, tmp_path, ORIGINAL)
    rest, _, _ = continued(kind, 4, tmp_path, ORIGINAL)
    assert rest != whole[4:]
    assert sorted(chain(*whole[:4], *rest)) != list(range(SIZE))


@pytest.mark.better("W9")
@pytest.mark.better("W8")
@pytest.mark.parametrize("stop", [1, 4, 11])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("kind", [*KINDS, "worker"])
def test_one_process_goes_on(kind: str, epoch: int, stop: int, tmp_path: Path):
    whole, following = interrupted(kind, epoch, stop, tmp_path)
    assert kind == "replacement" or sorted(chain(*whole)) == list(range(SIZE))
    rest, following_rest, gathered = continued(kind, stop, tmp_path)
    assert rest == whole[stop:]
    assert following_rest == following
    assert gathered == list(chain(*rest))


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_go_on(ranks: Any, kind: str, epoch: int, stop: int, tmp_path: Path):
    before = ranks(2).run(interrupted, kind, epoch, stop, tmp_path)
    after = ranks(2).run(continued, kind, stop, tmp_path)
    for (whole, following), (rest, following_rest, _) in zip(before, after, strict=True):
        assert rest == whole[stop:]
        assert following_rest == following
    assert after[0][2] == after[1][2]
    if kind in UNIQUE:
        seen = chain(*(chain(*whole[:stop]) for whole, _ in before), after[0][2])
        assert sorted(seen) == list(range(SIZE))


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("kind", UNIQUE)
def test_two_ranks_go_on_as_one(ranks: Any, kind: str, stop: int, tmp_path: Path):
    before = ranks(2).run(interrupted, kind, 1, stop, tmp_path)
    rest, following, gathered = continued(kind, None, tmp_path)
    assert sorted(chain(*(chain(*whole[:stop]) for whole, _ in before), *rest)) == list(range(SIZE))
    assert gathered == list(chain(*rest))
    assert sorted(chain(*following)) == list(range(SIZE))


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("kind", UNIQUE)
def test_one_goes_on_as_two_ranks(ranks: Any, kind: str, stop: int, tmp_path: Path):
    whole, _ = interrupted(kind, 1, stop, tmp_path)
    (*_, gathered), second = ranks(2).run(continued, kind, None, tmp_path)
    assert gathered == second[2]
    assert sorted(chain(*whole[:stop], gathered)) == list(range(SIZE))


def stopped_again(stop: int, folder: Path) -> list[int]:
    """What one rank of several sees, going on from a checkpoint and stopped once more."""
    with door() as accelerator:
        loader = accelerator.prepare(loader_of("plain"))
        accelerator.load_state(str(folder / "checkpoint"))
        found: list[int] = []
        for index, batch in enumerate(accelerator.skip_first_batches(loader), start=1):
            found += rows(batch)
            if index == stop:
                accelerator.save_state(str(folder / "checkpoint"))
                return found
    raise AssertionError


def test_stopped_twice_on_other_numbers_of_ranks(ranks: Any, tmp_path: Path):
    whole, _ = interrupted("plain", 0, 3, tmp_path)
    between = ranks(2).run(stopped_again, 2, tmp_path)
    again = stopped_again(1, tmp_path)
    rest, _, _ = continued("plain", None, tmp_path)
    assert sorted(chain(*whole[:3], *between, again, *rest)) == list(range(SIZE))


@pytest.mark.parametrize("kind", ["plain", "seeded", "generator"])
def test_stopped_between_epochs(kind: str, tmp_path: Path):
    with door(**options_of(kind)) as accelerator:
        loader = accelerator.prepare(loader_of(kind))
        list(loader)
        accelerator.save_state(str(tmp_path / "checkpoint"))
        expected = [rows(batch) for _ in range(2) for batch in loader]
    with door(**options_of(kind)) as accelerator:
        loader = accelerator.prepare(loader_of(kind))
        accelerator.load_state(str(tmp_path / "checkpoint"))
        assert loader.iteration == 1
        assert [rows(batch) for _ in range(2) for batch in loader] == expected


def test_stopped_before_the_first_epoch(tmp_path: Path):
    with door(use_seedable_sampler=True) as accelerator:
        loader = accelerator.prepare(loader_of("seeded"))
        accelerator.save_state(str(tmp_path / "checkpoint"))
        expected = [rows(batch) for batch in loader]
    with door(use_seedable_sampler=True) as accelerator:
        loader = accelerator.prepare(loader_of("seeded"))
        accelerator.load_state(str(tmp_path / "checkpoint"))
        assert [rows(batch) for batch in loader] == expected


def recipe(package: str, num_steps: int, folder: Path, is_restart: bool) -> list[list[list[int]]]:
    """Three epochs of the documented loop, which tells from a number of steps which epoch a checkpoint is of."""
    with door(package) as accelerator:
        torch.manual_seed(3 if not is_restart else 5)
        loader = accelerator.prepare(loader_of("plain"))
        first, skipped, found, step = 0, 0, [], 0
        if is_restart:
            accelerator.load_state(str(folder / "checkpoint"))
            first, skipped = divmod(num_steps, len(loader))
        for epoch in range(first, 3):
            active = accelerator.skip_first_batches(loader, skipped) if is_restart and epoch == first else loader
            found.append([])
            for batch in active:
                found[-1].append(rows(batch))
                step += 1
                if step == num_steps and not is_restart:
                    accelerator.save_state(str(folder / "checkpoint"))
        return found


@pytest.mark.parametrize("num_steps", [4, 11, 12, 22])
def test_the_documented_recipe_goes_on(num_steps: int, tmp_path: Path):
    whole, rest = (recipe(OURS, num_steps, tmp_path, is_restart) for is_restart in (False, True))
    epoch, skipped = divmod(num_steps, 11)
    assert rest == [whole[epoch][skipped:], *whole[epoch + 1 :]]


def test_after_the_last_batch_the_next_epoch_is_next(tmp_path: Path):
    _, following = interrupted("plain", 0, 11, tmp_path)
    with door() as accelerator:
        loader = accelerator.prepare(loader_of("plain"))
        accelerator.load_state(str(tmp_path / "checkpoint"))
        assert [rows(batch) for batch in loader] == following


def test_without_skipping_the_epoch_begins_again(tmp_path: Path):
    whole, following = interrupted("plain", 0, 4, tmp_path)
    with door() as accelerator:
        loader = accelerator.prepare(loader_of("plain"))
        accelerator.load_state(str(tmp_path / "checkpoint"))
        assert [rows(batch) for batch in loader] == whole
        assert [rows(batch) for batch in loader] == following


def resumed(kind: str, folder: Path) -> list[list[list[int]]]:
    """This rank's batches of the rest and of the next epoch, with a stateful loader."""
    with door(**options_of(kind), use_stateful_dataloader=True) as accelerator:
        loader = accelerator.prepare(loader_of(kind))
        accelerator.load_state(str(folder / "checkpoint"))
        return [[rows(batch) for batch in loader] for _ in range(2)]


@pytest.mark.parametrize("stop", [1, 4, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stateful_loader_skips_by_itself(kind: str, stop: int, tmp_path: Path):
    whole, following = interrupted(kind, 1, stop, tmp_path)
    expected = [whole[stop:], following] if stop < len(whole) else [following]
    assert resumed(kind, tmp_path)[: len(expected)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_stateful_loaders_of_two_ranks_skip_by_themselves(ranks: Any, kind: str, tmp_path: Path):
    before = ranks(2).run(interrupted, kind, 1, 3, tmp_path)
    for (whole, following), after in zip(before, ranks(2).run(resumed, kind, tmp_path), strict=True):
        assert after == [whole[3:], following]


def test_a_stateful_loader_that_is_left_begins_its_epoch_again():
    with door(use_stateful_dataloader=True) as accelerator:
        loader = accelerator.prepare(loader_of("generator"))
        batches = iter(loader)
        seen = [rows(next(batches)) for _ in range(4)]
        state = loader.state_dict()
        rest = [rows(batch) for batch in batches]
        loader.load_state_dict(state)
        assert [rows(next(iter(loader)))] == rest[:1]
        assert [rows(batch) for batch in loader] == seen + rest


def test_a_loader_alone_goes_on():
    """`state_dict` and `load_state_dict` of the loader, without a checkpoint of everything else."""
    with door() as accelerator:
        loader = accelerator.prepare(loader_of("generator"))
        batches = iter(loader)
        seen = [rows(next(batches)) for _ in range(4)]
        state = loader.state_dict()
        rest, following = [rows(batch) for batch in batches], [rows(batch) for batch in loader]
        again = accelerator.prepare(loader_of("generator"))
        again.load_state_dict(state)
        assert [rows(batch) for batch in accelerator.skip_first_batches(again, 4)] == rest
        assert [rows(batch) for batch in again] == following
        assert sorted(chain(*seen, *rest)) == list(range(SIZE))


@pytest.mark.parametrize(
    "state", [None, {}, {"epoch": 1}, [1], "epoch", {"_iterator_finished": True}], ids=lambda value: repr(value)[:12]
)
def test_what_is_no_state_is_refused(state: Any):
    with door() as accelerator:
        loader = accelerator.prepare(loader_of("plain"))
        with pytest.raises(ValueError, match=r"load_state_dict.*To fix it"):
            loader.load_state_dict(state)
        with pytest.raises(ValueError, match=r"load_state_dict.*To fix it"):
            loader.load_state_dict({**loader.state_dict(), "num_batches": -1})
        assert loader.iteration == 0


# --- metrics ---


def metrics_after_skipping(package: str, num_batches: int) -> list[int]:
    with door(package) as accelerator:
        loader = accelerator.prepare(DataLoader(torch.arange(11), batch_size=2))
        skipping = accelerator.skip_first_batches(loader, num_batches)
        return list(chain(*(accelerator.gather_for_metrics(batch).tolist() for batch in skipping)))


@pytest.mark.better("W11")
def test_metrics_after_skipping_have_no_duplicates(ranks: Any):
    original = ranks(2).run(metrics_after_skipping, ORIGINAL, 1)[0]
    assert original == [*range(4, 11), 0]  # the control
    for num_batches in range(4):
        for found in ranks(2).run(metrics_after_skipping, OURS, num_batches):
            assert found == list(range(11))[4 * num_batches :]
