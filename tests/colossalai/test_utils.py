"""What scripts use around a training loop."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from macrobatch.colossalai import utils
from macrobatch.colossalai.context import ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.nn.lr_scheduler import CosineAnnealingWarmupLR
from macrobatch.errors import StateError

pytestmark = pytest.mark.xdist_group("ranks")


class Draws(Dataset):
    """Each sample is what a worker draws at random for it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_loader_of_one_process_is_torchs():
    loader = utils.get_dataloader(list(range(5)), batch_size=2, drop_last=True, add_sampler=True)
    assert type(loader) is DataLoader
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    torch.manual_seed(1)
    shuffled = [int(x) for x in utils.get_dataloader(list(range(9)), shuffle=True)]
    torch.manual_seed(1)
    assert shuffled == [int(x) for x in DataLoader(list(range(9)), shuffle=True)]
    assert [int(x) for x in utils.get_dataloader(Endless())] == [0, 1, 2]
    own = utils.get_dataloader(list(range(4)), sampler=SequentialSampler(range(2)))
    assert [int(x) for x in own] == [0, 1]
    with pytest.raises(ValueError, match="seed"):
        utils.get_dataloader([1], seed=-1)


def init_worker(worker):
    random.seed(worker)  # the user's own, which comes last


def test_workers_draw_differently_in_every_worker_and_epoch():
    loader = utils.get_dataloader(Draws(), batch_size=4, num_workers=2)
    drawn = torch.cat([*loader, *loader])
    assert all(len(set(column.tolist())) == 16 for column in drawn.unbind(1))
    torch.manual_seed(5)
    first = torch.cat(list(loader))
    torch.manual_seed(5)
    assert torch.equal(first, torch.cat(list(loader)))
    own = torch.cat(list(utils.get_dataloader(Draws(), batch_size=4, num_workers=2, worker_init_fn=init_worker)))
    assert own[0, 0].item() == pytest.approx(random.Random(0).random())


def job_of_loader(shuffle, drop_last):
    """On every rank: two epochs of its share of 10 samples, and a loader that is not shared."""
    loader = utils.get_dataloader(list(range(10)), shuffle=shuffle, drop_last=drop_last, batch_size=2, seed=7)
    epochs = [[int(x) for batch in loader for x in batch] for _ in range(2)]
    whole = [int(x) for x in utils.get_dataloader(list(range(3)), add_sampler=False)]
    return epochs, whole, type(loader) is DataLoader, len(loader)


def job_of_endless():
    return utils.get_dataloader(Endless())


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_share_a_data_set(ranks, shuffle):
    seen = ranks(2).run(job_of_loader, shuffle, False)
    for epoch in range(2):
        shares = [epochs[epoch] for epochs, *_ in seen]
        assert sorted(shares[0] + shares[1]) == list(range(10))
    assert all(whole == [0, 1, 2] and is_torch and length == 3 for _, whole, is_torch, length in seen)
    first, second = seen[0][0]
    assert (first != second) == shuffle  # the next order comes without set_epoch


def test_a_data_set_without_a_length_is_not_shared_by_itself(ranks):
    for ok, text in ranks(2).outcomes(job_of_endless):
        assert not ok
        assert "add_sampler=False" in text


# --- time ------------------------------------------------------------------------------------------------------------


def test_timers():
    timer = utils.MultiTimer()
    for _ in range(2):
        timer.start("step")
        timer.stop("step", keep_in_history=True)
    each = timer.get_timer("step")
    assert each.get_history_sum() == pytest.approx(2 * each.get_history_mean())
    assert each.get_elapsed_time() >= 0
    assert [name for name, _ in timer] == ["step"]
    timer.reset()  # all of them
    assert not each.has_history
    assert each.get_history_mean() == 0
    with pytest.raises(RuntimeError, match="start"):
        each.stop()
    with pytest.raises(ValueError, match="epoch"):
        timer.stop("epoch")
    timer.set_status(False)
    timer.start("epoch")
    timer.stop("epoch")
    assert not timer.is_on()
    assert [name for name, _ in timer] == ["step"]


# --- ranks and devices -----------------------------------------------------------------------------------------------


def test_alone_everything_is_first_and_last(capsys):
    assert utils.is_dp_rank_0()
    assert utils.is_tp_rank_0()
    assert utils.is_no_pp_or_last_stage()
    assert not utils.is_using_ddp()
    assert not utils.is_using_pp()
    assert not utils.is_using_sequence()
    utils.print_rank_0("said")
    utils.print_rank_0("logged", get_dist_logger())
    out, err = capsys.readouterr()
    assert (out, err) == ("said\n", "colossalai - colossalai - INFO: logged\n")


def test_small_helpers(tmp_path, capsys):
    assert 0 < utils.free_port() < 65536
    utils.ensure_path_exists(tmp_path / "a" / "b" / "file")
    assert (tmp_path / "a" / "b").is_dir()
    context = nullcontext(3)
    assert utils.conditional_context(context) is context
    with utils.conditional_context(context, enable=False) as value:
        assert value is None
    param = nn.Parameter(torch.zeros(1))
    assert not utils.is_ddp_ignored(param)
    param._ddp_to_ignore = True
    assert utils.is_ddp_ignored(param)
    utils.report_memory_usage("after the epoch", report_cpu=True)
    assert "[Rank 0] after the epoch: " in capsys.readouterr().err
    utils.synchronize()
    utils.empty_cache()
    if not torch.cuda.is_available():
        assert utils.get_current_device() == torch.device("cpu")
        assert utils.set_to_cuda(param) is param


def job_of_sync():
    """On every rank: parameters and buffers before and after."""
    model = nn.BatchNorm1d(2)
    rank = gpc.get_global_rank()
    model.weight.data.fill_(rank)
    model.register_buffer("seen", torch.tensor([float(rank)]))
    utils.sync_model_param(model, ParallelMode.TENSOR)  # each rank with itself
    before = model.weight[0].item()
    utils.sync_model_param(model, ParallelMode.DATA)
    return before, model.weight[0].item(), model.seen.item(), utils.is_using_ddp(), utils.is_dp_rank_0()


def test_a_model_is_made_the_same_with_its_buffers(ranks):
    assert ranks(2).run(job_of_sync) == [(0, 0, 0, True, True), (1, 0, 0, True, False)]


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_is_torchs_on_a_cpu(norm_type, max_norm):
    ours, peer = (nn.Linear(4, 3).double() for _ in range(2))
    for index, (a, b) in enumerate(zip(ours.parameters(), peer.parameters(), strict=True)):
        a.grad = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(index))
        b.grad = a.grad.clone()
    norm = utils.clip_grad_norm_fp32(ours.parameters(), max_norm, norm_type)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(peer.parameters(), max_norm, norm_type))
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_norms_are_taken_in_fp32_and_zero_only_measures():
    weight = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    weight.grad = torch.full((4,), 300.0, dtype=torch.float16)  # the square is beyond fp16
    assert utils.clip_grad_norm_fp32(weight, 0.0).item() == 600
    assert weight.grad[0].item() == 300
    assert utils.clip_grad_norm_fp32([torch.zeros(1)], 1.0).item() == 0
    for bad in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_norm"):
            utils.clip_grad_norm_fp32(weight, bad)


def test_zeros_are_counted():
    weight = torch.zeros(4, requires_grad=True)
    weight.grad = torch.tensor([0.0, 1.0, 0.0, 2.0])
    assert utils.count_zeros_fp32([weight, torch.zeros(3, requires_grad=True)]) == 2


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Run:
    """A model, its optimizer with momentum, and a schedule."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 1).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = CosineAnnealingWarmupLR(self.optimizer, 10, 2)

    def update(self):
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 3, dtype=torch.float64)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    def state(self):
        return [each.state_dict() for each in (self.model, self.optimizer, self.scheduler)]


def test_going_on_from_a_checkpoint(tmp_path):
    file = tmp_path / "folder" / "epoch.pt"
    run = Run()
    for _ in range(3):
        run.update()
    utils.save_checkpoint(file, 2, run.model, run.optimizer, run.scheduler)
    run.update()

    other = Run(seed=1)
    assert utils.load_checkpoint(file, other.model, other.optimizer, other.scheduler) == 2
    other.update()
    assert torch.equal(run.model.weight, other.model.weight)
    assert run.scheduler.get_last_lr() == other.scheduler.get_last_lr()
    assert [path.name for path in file.parent.iterdir()] == ["epoch.pt"]


def test_a_checkpoint_of_a_model_alone(tmp_path):
    run, other = Run(), Run(seed=1)
    utils.save_checkpoint(tmp_path / "a.pt", 7, run.model)
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == {"epoch", "model"}
    assert utils.load_checkpoint(tmp_path / "a.pt", other.model) == 7
    assert torch.equal(run.model.weight, other.model.weight)
    with pytest.raises(StateError, match="no 'optimizer'"):
        utils.load_checkpoint(tmp_path / "a.pt", other.model, other.optimizer)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def damaged(kind, path, run):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        torch.save({"epoch": 1, "model": Evil()}, path)
    elif kind == "list":
        torch.save([1], path)
    elif kind == "shape":
        torch.save({"epoch": 1, "model": {**run.model.state_dict(), "weight": torch.zeros(2, 2)}}, path)
    elif kind == "missing entry":
        torch.save({"epoch": 1, "model": {"weight": run.model.weight.data}}, path)
    elif kind == "other optimizer":
        other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        torch.save({"epoch": 1, "model": run.model.state_dict(), "optimizer": other.state_dict()}, path)
    elif kind == "no moments":
        torch.save(
            {**torch.load(path), "optimizer": {"param_groups": run.optimizer.state_dict()["param_groups"]}}, path
        )
    elif kind == "other moments":
        saved = torch.load(path)
        saved["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
        torch.save(saved, path)
    elif kind == "other scheduler":
        other = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
        torch.save({**torch.load(path), "lr_scheduler": other.state_dict()}, path)
    elif kind == "no scheduler":
        torch.save({**torch.load(path), "lr_scheduler": {}}, path)
    elif kind == "no tensor":
        torch.save({**torch.load(path), "model": {**run.model.state_dict(), "weight": 1.0}}, path)
    elif kind == "no epoch":
        torch.save({"model": run.model.state_dict()}, path)
    elif kind == "no file":
        path.unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "code",
        "list",
        "shape",
        "missing entry",
        "no tensor",
        "other optimizer",
        "no moments",
        "other moments",
        "other scheduler",
        "no scheduler",
        "no epoch",
        "no file",
    ],
)
def test_a_damaged_checkpoint_changes_nothing(tmp_path, capfd, kind):
    run, other = Run(), Run(seed=1)
    run.update()
    path = tmp_path / "a.pt"
    utils.save_checkpoint(path, 1, run.model, run.optimizer, run.scheduler)
    damaged(kind, path, run)
    before = repr(other.state())
    with pytest.raises(StateError):
        utils.load_checkpoint(path, other.model, other.optimizer, other.scheduler)
    assert repr(other.state()) == before
    assert "run" not in capfd.readouterr().out


def test_what_only_one_of_them_can_refuse_is_taken_back_from_the_others(tmp_path):
    class Unwilling(WindowState):
        def load_state_dict(self, state):
            raise KeyError("a key of its own")

    run, other = Run(), Run(seed=1)
    run.update()
    utils.save_checkpoint(tmp_path / "a.pt", 1, run.model, run.optimizer, run.scheduler, WindowState(1.0))
    before = repr(other.state())
    with pytest.raises(KeyError, match="of its own"):
        utils.load_checkpoint(tmp_path / "a.pt", other.model, other.optimizer, other.scheduler, engine=Unwilling())
    assert repr(other.state()) == before


def test_not_strict(tmp_path):
    run, other = Run(), Run(seed=1)
    torch.save({"epoch": 1, "model": {"weight": run.model.weight.data}}, tmp_path / "a.pt")
    utils.load_checkpoint(tmp_path / "a.pt", other.model, strict=False)
    assert torch.equal(run.model.weight, other.model.weight)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    run = Run()
    utils.save_checkpoint(tmp_path / "a.pt", 1, run.model)
    content = (tmp_path / "a.pt").read_bytes()

    class Half:
        def state_dict(self):
            return {"x": lambda: None}  # cannot be pickled

    with pytest.raises(Exception, match=r"pickle|lambda"):
        utils.save_checkpoint(tmp_path / "a.pt", 2, run.model, Half())
    assert (tmp_path / "a.pt").read_bytes() == content


class WindowState:
    """An engine as far as checkpoints know it: what its window has seen on this rank."""

    def __init__(self, value=None):
        self.state = {
            "window": {},
            "precision": {},
            "pending": None if value is None else {"tally": {}, "gradients": [torch.tensor(value)]},
        }

    def state_dict(self):
        return self.state

    def check_state_dict(self, state):
        (gradient,) = [None] if state["pending"] is None else state["pending"]["gradients"]
        if gradient is not None and gradient.ndim:
            raise StateError("a window", given=gradient, expected="a number", fix="save one")

    def load_state_dict(self, state):
        self.state = state

    @property
    def gradient(self):
        (gradient,) = self.state["pending"]["gradients"]
        return None if gradient is None else gradient.item()


def job_of_saving_where_the_first_rank_cannot(file):
    """By rank: what a save raises, and what is loaded afterwards."""
    model, rank = nn.Linear(1, 1), gpc.get_global_rank()
    utils.save_checkpoint(file, 0, model, engine=WindowState(10.0 + rank))

    class Half:
        def state_dict(self):
            return {"x": lambda: None}  # cannot be pickled

    raised = None
    try:
        utils.save_checkpoint(file, 1, model, Half(), engine=WindowState(20.0 + rank))
    except Exception as error:
        raised = type(error).__name__, "rank" in str(error)
    loaded = WindowState()
    return raised, utils.load_checkpoint(file, model, engine=loaded), loaded.gradient


def test_all_ranks_hear_of_a_save_that_fails_on_the_first(ranks, tmp_path):
    first, second = ranks(2).run(job_of_saving_where_the_first_rank_cannot, str(tmp_path / "a.pt"))
    assert first[0][0] != "PeerError"  # its own
    assert second[0] == ("PeerError", True)
    assert (first[1:], second[1:]) == ((0, 10.0), (0, 11.0))


def job_of_saving(file):
    """On every rank: save twice, load twice."""
    model = nn.Linear(1, 1)
    rank = gpc.get_global_rank()
    for epoch in range(2):
        utils.save_checkpoint(file, epoch, model, engine=WindowState(10.0 * epoch + rank))
    loaded = WindowState()
    return utils.load_checkpoint(file, model, engine=loaded), loaded.gradient


def job_of_loading_a_part_that_does_not_fit(file):
    """By rank: what a load raises where the second rank's part is of another shape, and what has changed."""
    torch.manual_seed(0)
    run, rank = Run(seed=1), gpc.get_global_rank()
    utils.save_checkpoint(file, 0, Run().model, engine=WindowState([1.0] if rank else 1.0))
    before, engine = repr(run.state()), WindowState()
    try:
        utils.load_checkpoint(file, run.model, engine=engine)
    except Exception as error:
        return type(error).__name__, repr(run.state()) == before, engine.state["pending"]
    return "", None, None


def test_all_ranks_take_a_checkpoint_over_or_none(ranks, tmp_path):
    outcomes = ranks(2, timeout_s=20.0).run(job_of_loading_a_part_that_does_not_fit, str(tmp_path / "a.pt"))
    assert outcomes == [("PeerError", True, None), ("StateError", True, None)]


def test_every_rank_has_its_own_part_of_a_window(ranks, tmp_path):
    file = tmp_path / "a.pt"
    assert ranks(2).run(job_of_saving, str(file)) == [(1, 10.0), (1, 11.0)]
    assert len(list(tmp_path.iterdir())) == 2  # parts of older checkpoints are gone
    alone = WindowState()
    utils.load_checkpoint(file, nn.Linear(1, 1), engine=alone)
    assert alone.gradient == 21.0  # the window of both, on one rank
    (part,) = (path for path in tmp_path.iterdir() if path != file)
    part.unlink()
    before = alone.state
    with pytest.raises(StateError):
        utils.load_checkpoint(file, nn.Linear(1, 1), engine=alone)
    assert alone.state is before
