"""Training with `FullyShardedDataParallelPlugin`, which the original ignores on CPUs: the same as without it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.errors import StateError
from macrobatch.sync import Policy
from tests.accelerate.doors import OURS, entered
from tests.sync.windows import Collectives

pytestmark = pytest.mark.xdist_group("ranks")


def train(
    is_sharded: bool, each_batch: bool, stop: int | None, folder: Path | None, start: int = 0, reshards: bool = False
) -> tuple[dict[str, Tensor], float, list[Any]]:
    """Weights, the last norm, and what strategy held between micro-batches, after two epochs of five ragged batches.

    Saves and ends after `stop` micro-batches; with a folder and no stop, goes on from there, which was after `start`.
    """
    with entered(OURS) as door:
        torch.manual_seed(0)
        accelerator = door.Accelerator(
            cpu=True,
            gradient_accumulation_plugin=door.GradientAccumulationPlugin(num_steps=3, sync_each_batch=each_batch),
            fsdp_plugin=door.FullyShardedDataParallelPlugin() if is_sharded else None,
        )
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = TensorDataset(torch.randn(34, 6), torch.randint(0, 3, (34,)))
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
        num_seen, norm = 0, 0.0
        if folder is not None and stop is None:
            accelerator.load_state(str(folder))
            loader, num_seen = accelerator.skip_first_batches(loader), start
        for _ in range(start // 5, 2):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), y))
                    if accelerator.sync_gradients:
                        norm = float(accelerator.clip_grad_norm_(model.parameters(), 0.5))
                    optimizer.step()
                    optimizer.zero_grad()
                num_seen += 1
                if reshards and num_seen == 5:  # the policy has just been chosen
                    accelerator._counting.windows.all[0].sync.policy = Policy(keep_parameters=False, reduce_last=True)
                if num_seen == stop:
                    accelerator.save_state(str(folder))
                    return {}, norm, []
            loader = accelerator._dataloaders[0]  # whole again
        policies = [getattr(window.sync, "policy", None) for window in accelerator._counting.windows.all]
        return accelerator.get_state_dict(model), norm, policies


@pytest.mark.parametrize("each_batch", [False, True])
def test_sharded_training_is_the_same(ranks: Any, each_batch: bool):
    (plain, norm, _), _ = ranks(2).run(train, False, each_batch, None, None)
    for weights, sharded_norm, (policy,) in ranks(2).run(train, True, each_batch, None, None)[:1]:
        assert weights.keys() == plain.keys()
        for name, weight in weights.items():
            # Sums of float32 in another order, and twelve steps of AdamW, which divides by gradients' own size.
            torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-5)
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        assert policy.reduce_last is policy.keep_parameters is (not each_batch)


@pytest.mark.parametrize("stop", [4, 7], ids=["in the second window", "in the third window"])
@pytest.mark.parametrize(("each_batch", "reshards"), [(True, False), (False, False), (False, True)])
def test_sharded_training_goes_on_in_the_middle_of_a_window(
    ranks: Any, tmp_path: Path, each_batch: bool, reshards: bool, stop: int
):
    """From the third window on, whole gradients, and whole parameters, may be held between micro-batches."""
    whole = ranks(2).run(train, True, each_batch, None, None)[0][0]
    ranks(2).run(train, True, each_batch, stop, tmp_path, 0, reshards)
    resumed = ranks(2).run(train, True, each_batch, None, tmp_path, stop)[0][0]
    assert whole
    for name, weight in whole.items():
        # Without sync_each_batch, a run chooses what to hold after its second window, and from then on adds up in
        # another order: a few roundings of 6e-8.
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0 if each_batch else 1e-6)


def in_threes(door: Any) -> tuple[Any, Any, Any]:
    """An accelerator with windows of three, and a sharded model with an optimizer that has no state."""
    torch.manual_seed(0)
    accelerator = door.Accelerator(
        cpu=True, gradient_accumulation_steps=3, fsdp_plugin=door.FullyShardedDataParallelPlugin()
    )
    model: Any = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def micro_steps(folder: str, what: str) -> list[Tensor]:
    """Weights after three windows of three micro-batches.

    To "save" ends in the third one; to "resume" goes on from there; "fails" raises in its second micro-batch, and
    "empty" has no samples in its first two. "fails and saves" raises in a fourth window, and saves what is left of it.
    """
    with entered(OURS) as door:
        accelerator, model, optimizer = in_threes(door)
        micro_batches = torch.randn(11, 4, 3, 2)[: 11 if "saves" in what else 9, accelerator.process_index]
        if what == "resume":
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the checkpoint's counts
            accelerator.load_state(folder)
        for index, x in enumerate(micro_batches):
            if what == "resume" and index < 7:
                continue
            rows = x[:0] if what == "empty" and index in (6, 7) else x
            with suppress(KeyError), accelerator.accumulate(model):
                if "fails" in what and index == (10 if "saves" in what else 7):
                    raise KeyError
                accelerator.backward(model(rows).square().sum(), weight=len(rows))
                optimizer.step()
                optimizer.zero_grad()
            if (what, index) in (("save", 6), ("fails and saves", 10)):
                accelerator.save_state(folder)
                break
        return list(accelerator.get_state_dict(model).values()) if what != "save" else []


def test_an_optimizer_without_state_goes_on(ranks: Any, tmp_path: Path):
    whole = ranks(2).run(micro_steps, str(tmp_path), "train")[0]
    ranks(2).run(micro_steps, str(tmp_path), "save")
    resumed = ranks(2).run(micro_steps, str(tmp_path), "resume")[0]
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)  # sums in another order, as above


def saved_at_once(folder: str, saves: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after three updates of an optimizer that counts them: trained on, and gone on with. Saved before the
    first one, and after an evaluation, which may leave parameters whole."""
    with entered(OURS) as door:
        weights: list[list[Tensor]] = []
        for loads in (False, True):
            torch.manual_seed(0)
            accelerator = door.Accelerator(cpu=True, fsdp_plugin=door.FullyShardedDataParallelPlugin())
            model: Any = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
            optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
            model, optimizer = accelerator.prepare(model, optimizer)
            micro_batches = torch.randn(4, 3, 2)
            for index, x in enumerate(micro_batches):
                if index in (0, 3) and saves:
                    with torch.no_grad():
                        model(x)
                    if not loads:
                        accelerator.save_state(f"{folder}/{index}")
                    elif index == 0:
                        accelerator.load_state(f"{folder}/{index}")
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
            weights.append(list(accelerator.get_state_dict(model).values()))
        return weights[0], weights[1]


def test_to_save_changes_nothing_of_an_optimizer_that_is_new(ranks: Any, tmp_path: Path):
    (whole, _), _ = ranks(2).run(saved_at_once, str(tmp_path), False)
    (saved, resumed), _ = ranks(2).run(saved_at_once, str(tmp_path), True)
    torch.testing.assert_close(saved, whole, rtol=0, atol=1e-6)  # sums in another order, as above
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)


def test_a_window_of_which_nothing_is_left_is_saved(ranks: Any, tmp_path: Path):
    expected, found = (ranks(2).run(micro_steps, str(tmp_path), what)[0] for what in ("train", "fails and saves"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def refused(folder: str) -> str:
    try:
        micro_steps(folder, "resume")
    except StateError as error:
        return str(error)
    return ""


def test_a_window_under_way_is_refused_by_another_number_of_ranks(ranks: Any, tmp_path: Path):
    """Of two ranks and four, some pieces of the parameters have the same shapes."""
    ranks(4).run(micro_steps, str(tmp_path), "save")
    assert all("4 ranks, as when it was saved" in told for told in ranks(2).run(refused, str(tmp_path)))


def test_nothing_is_left_of_micro_batches_that_are_given_up(ranks: Any, tmp_path: Path):
    """All ranks fail in the second micro-batch of a window: what they have of the first is not in its gradient."""
    expected, found = (ranks(2).run(micro_steps, str(tmp_path), what)[0] for what in ("empty", "fails"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def collectives_of_windows(kind: str) -> list[dict[str, int]]:
    """Collectives of four windows of three micro-batches each."""
    with entered(OURS) as door:
        options: dict[str, Any] = {
            "sharded": {"fsdp_plugin": door.FullyShardedDataParallelPlugin()},
            "wrapped": {"kwargs_handlers": [door.DistributedDataParallelKwargs()]},
        }[kind]
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=3, **options)
        model: Any = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        counts: list[dict[str, int]] = []
        for _ in range(4):
            with Collectives() as collectives:
                for _ in range(3):
                    with accelerator.accumulate(model):
                        accelerator.backward(model(torch.randn(3, 2)).square().mean())
                        optimizer.step()
                        optimizer.zero_grad()
            counts.append(dict(collectives.count))
        return counts


def test_a_window_gathers_no_more_than_its_policy_says(ranks: Any):
    """Parameters once in each micro-batch, and from the third window on once; nothing is forgotten in between, and no
    rank asks another for samples, which a loop of one's own could not run."""
    *lean, third, fourth = ranks(2).run(collectives_of_windows, "sharded")[0]
    assert [count["allgather_base"] for count in lean] == [3, 3]
    # Of the two small sums, one is in front of the window and one at its end.
    assert third == fourth == {"allgather_base": 1, "reduce_scatter_base": 1, "allreduce": 2}


def test_a_wrapped_window_has_one_small_sum_beside_ddps_own(ranks: Any):
    *_, last = ranks(2).run(collectives_of_windows, "wrapped")[0]
    assert last == {"allreduce": 2}


def gone_back(folder: str, how: str) -> Tensor:
    """Weights after four windows, the last of which is gone back into from where it is left: further on, or failed."""
    with entered(OURS) as door:
        accelerator, model, optimizer = in_threes(door)
        micro_batches = torch.randn(12, 2, 3, 2)[:, accelerator.process_index]

        def train(start: int, stop: int, fails: bool = False) -> None:
            for x in micro_batches[start:stop]:
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).square().mean())
                    if fails:
                        raise ConnectionError
                    optimizer.step()
                    optimizer.zero_grad()

        train(0, 10)
        accelerator.save_state(folder)
        if how:
            with suppress(ConnectionError):
                train(10, 11, fails=how == "failed")
            accelerator.load_state(folder)
        train(10, 12)
        return torch.cat([param.full_tensor().detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("how", ["further on", "failed"])
def test_what_is_held_of_a_window_is_given_up_for_a_checkpoints(ranks: Any, tmp_path: Path, how: str):
    """From the third window on, FSDP2 holds whole gradients until the last micro-batch."""
    expected = ranks(2).run(gone_back, str(tmp_path), "")
    for weights, same in zip(ranks(2).run(gone_back, str(tmp_path), how), expected, strict=True):
        assert torch.equal(weights, same)


def clipped_in_each_micro_batch(is_sharded: bool) -> list[Tensor]:
    """Norms of the last micro-batches of five windows, and weights at the end, of a loop that does not ask whether a
    micro-batch is the last before it clips the whole, a part and each element."""
    with entered(OURS) as door:
        torch.manual_seed(0)
        plugin = door.FullyShardedDataParallelPlugin() if is_sharded else None
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
        model: Any = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        norms: list[Tensor] = []
        for x in torch.randn(10, 2, 3, 2)[:, accelerator.process_index]:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.2)
                accelerator.clip_grad_norm_(model[0].parameters(), 0.1)
                accelerator.clip_grad_value_(model[2].parameters(), 0.05)
                if accelerator.sync_gradients:
                    norms.append(torch.tensor(float(norm)))
                optimizer.step()
                optimizer.zero_grad()
        return [*norms, *accelerator.get_state_dict(model).values()]


def test_clipping_in_every_micro_batch_clips_the_last(ranks: Any):
    """From the third window on, the model shows whole parameters in between, which are not the optimizer's."""
    plain = ranks(2).run(clipped_in_each_micro_batch, False)[0]
    for found, expected in zip(ranks(2).run(clipped_in_each_micro_batch, True)[0], plain, strict=True):
        # Sums of float32 in another order, over five updates.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
