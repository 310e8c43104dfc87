"""Losses that couple the macro-batch of all ranks, against the same loss of the whole batch in one process."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import macrobatch as mb
from macrobatch import tree
from macrobatch.sync import LocalSync, make_sync
from tests.sync.windows import EXACT, WRONG, off_from_alone, run, same_everywhere

pytestmark = pytest.mark.xdist_group("ranks")

IMPATIENT_S = 20.0  # for what would leave ranks waiting if it failed
F64 = torch.float64
STRATEGIES = ["replicated", "sharded", "wrapped", "FSDP1"]
SHARES = {  # samples, by window and rank
    "even": [[4, 4], [4, 4]],
    "uneven": [[5, 2], [1, 7]],
    "a rank without samples": [[6, 1], [0, 3], [4, 0]],
    "a rank without samples in the first window": [[0, 5], [3, 2]],
}


def rows(num: int, *, seed: int) -> dict[str, Tensor]:
    """Two views of each sample, and a label."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(num, 6, dtype=F64, generator=draw) for _ in range(2))
    return {"left": left, "right": right, "label": torch.randint(3, (num,), generator=draw)}


def towers() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5, dtype=F64), nn.Tanh(), nn.Linear(5, 4, dtype=F64))


def encode(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Two representations, and what has no slope: labels, flags, names."""
    left, right = (F.normalize(model(batch[side]), dim=1) for side in ("left", "right"))
    is_odd = batch["label"] % 2 == 1
    return {
        "pair": (left, right),
        "label": batch["label"],
        "odd": is_odd,
        "names": [str(int(n)) for n in batch["label"]],
    }


def contrastive(representations: dict[str, Any]) -> Tensor:
    """Every sample against every other of the macro-batch; those of one label attract each other."""
    left_BD, right_BD = representations["pair"]
    label_B, odd_B = representations["label"], representations["odd"]
    assert representations["names"] == [str(int(n)) for n in label_B]
    logits_BB = left_BD @ right_BD.T / 0.2
    alike_BB = (label_B[:, None] == label_B[None]).to(F64)
    weight_B = 1.0 + odd_B
    loss_B = -(logits_BB.log_softmax(1) * alike_BB).sum(1) / alike_BB.sum(1)
    return (loss_B * weight_B).sum() / weight_B.sum()


def prepared(strategy: str, model: nn.Module) -> nn.Module:
    if strategy == "sharded":
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))  # pyright: ignore[reportReturnType]
    if strategy == "wrapped":
        return DistributedDataParallel(model)
    if strategy == "FSDP1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model


def windows_of(shares: list[list[int]], num: int) -> list[list[list[Any]]]:
    """By window and rank, micro-batches of `num` samples."""
    return [
        [list(_cut(rows(size, seed=10 * window + rank), num)) for rank, size in enumerate(sizes)]
        for window, sizes in enumerate(shares)
    ]


def _cut(batch: dict[str, Tensor], num: int) -> list[Any]:
    size = len(batch["label"])
    return tree.split(batch, [min(num, size - begin) for begin in range(0, size, num)]) if size else []


def off(strategy: str, shares: list[list[int]], options: dict[str, Any]) -> float:
    loss_fn = mb.TwoPass(encode, contrastive)
    windows = windows_of(shares, 2)
    if strategy != "FSDP1":
        prepare = lambda model: prepared(strategy, model)  # noqa: E731
        sync = None if strategy == "replicated" else make_sync("auto", prepare(towers()))
        return off_from_alone(towers(), loss_fn, windows, prepare=prepare, sync=sync, **options)
    # Pieces of FSDP1 have other names and shapes than the model's: numbers of the window, then the model as a whole.
    alone, model = towers(), prepared(strategy, towers())
    mine = [window[dist.get_rank()] for window in windows]
    together = run(model, loss_fn, mine, sync="auto", **options)
    by_itself = run(alone, loss_fn, [list(chain(*window)) for window in windows], sync=LocalSync(), **options)
    found = [abs(a.loss / b.loss - 1) for a, b in zip(together, by_itself, strict=True)]
    found += [abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(together, by_itself, strict=True)]
    with FullyShardedDataParallel.summon_full_params(model):
        whole = torch.cat([param.detach().view(-1) for param in model.parameters()])
    wanted = torch.cat([param.detach().view(-1) for param in alone.parameters()])
    return max(*found, float((whole - wanted).norm() / wanted.norm()))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shares", SHARES)
def test_coupled_windows_over_ranks_equal_one_process(ranks, strategy, shares, options):
    assert max(ranks(2).run(off, strategy, SHARES[shares], options)) <= EXACT


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_coupled_windows_over_four_ranks_equal_one_process(ranks, strategy):
    assert max(ranks(4).run(off, strategy, [[3, 1, 4, 2], [0, 2, 0, 5]], {})) <= EXACT


def test_control_ranks_that_do_not_see_each_other_have_another_loss():
    model, shares = towers(), [rows(4, seed=rank) for rank in range(2)]
    whole = contrastive(encode(model, tree.cat(shares))).item()
    apart = [contrastive(encode(model, share)).item() for share in shares]
    assert abs(sum(apart) / 2 / whole - 1) > WRONG


class Scaled(nn.Module):
    """Towers with a temperature that the loss uses, not the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = towers()
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.towers(x)


def temperature(shares: list[list[int]]) -> float:
    """Each rank's loss has to use its own parameter; a window in front of each side shows where it stands."""
    holder: list[Scaled] = []
    together, alone = Scaled(), Scaled()

    def loss(representations: dict[str, Any]) -> Tensor:
        return contrastive(
            {**representations, "pair": tuple(side / holder[0].temperature for side in representations["pair"])}
        )

    ends: list[Tensor] = []
    for model, sync in ((together, "auto"), (alone, LocalSync())):
        holder[:] = [model]
        windows = windows_of(shares, 2)
        mine = [list(chain(*window)) if model is alone else window[dist.get_rank()] for window in windows]
        run(model, mb.TwoPass(encode, loss), mine, sync=sync)
        ends.append(torch.cat([param.detach().view(-1) for param in model.parameters()]))
    assert float(ends[1][0]) != 0.3
    return float((ends[0] - ends[1]).norm() / ends[1].norm()) if same_everywhere(ends[0].tolist()) else float("inf")


@pytest.mark.parametrize("shares", SHARES)
def test_parameter_of_the_loss_itself_gets_its_gradient_once(ranks, shares):
    assert max(ranks(2).run(temperature, SHARES[shares])) <= EXACT


class Boom(RuntimeError):
    """Raised by a user's function."""


def failing(strategy: str, where: str, num_before: int) -> list[str | None]:
    """Rank 1 fails in one window; what the ranks say of it, and of the one after, and whether that one is right."""
    model: Any = prepared(strategy, towers())
    fails = [False]

    def encode_or_fail(model: Any, batch: dict[str, Tensor]) -> Any:
        if fails[0] and where == "encode":
            raise Boom
        representations = encode(model, batch)
        if fails[0] and where == "dtype":
            representations["label"] = representations["label"].int()
        return representations

    def loss_or_fail(representations: dict[str, Any]) -> Tensor:
        if fails[0] and where == "loss":
            raise Boom
        return contrastive(representations)

    lonely = copy.deepcopy(towers())
    step, alone = (
        mb.TrainStep(m, SGD(m.parameters(), lr=0.1), mb.TwoPass(*functions), micro_batch=2, sync=sync)
        for m, functions, sync in (
            (model, (encode_or_fail, loss_or_fail), "auto"),
            (lonely, (encode, contrastive), LocalSync()),
        )
    )
    said: list[str | None] = []
    for index in range(num_before + 2):
        shares = [rows(3, seed=2 * index + rank) for rank in range(2)]
        fails[0] = index == num_before and dist.get_rank() == 1
        share: Any = shares[dist.get_rank()]
        if fails[0] and where == "split":
            share = {**share, "label": share["label"][1:]}
        try:
            result = step(share)
        except (Boom, mb.errors.MacrobatchError) as error:
            said.append(type(error).__name__)
        else:
            said.append(None)
            wanted = alone(tree.cat(shares))
            assert abs(result.loss / wanted.loss - 1) <= EXACT
            assert abs(float(result.grad_norm) / float(wanted.grad_norm) - 1) <= EXACT
    return said


@pytest.mark.parametrize("num_before", [0, 1], ids=["first window", "later window"])
@pytest.mark.parametrize(
    ("where", "on_0", "on_1"),
    [
        ("split", "PeerError", "BatchError"),
        ("encode", "PeerError", "Boom"),
        ("dtype", "BatchError", "BatchError"),
        ("loss", "PeerError", "Boom"),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_error_on_one_rank_before_the_first_backward_reaches_the_other(ranks, strategy, where, on_0, on_1, num_before):
    if where == "encode" and strategy in ("sharded", "FSDP1"):
        pytest.skip("the other waits in the forward itself, which gathers parameters (documented)")
    said = ranks(2, IMPATIENT_S).run(failing, strategy, where, num_before)
    assert said == [[None] * num_before + [on_0, None], [None] * num_before + [on_1, None]]


def policies(normalize: str) -> str:
    model = towers()
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), mb.TwoPass(encode, contrastive), micro_batch=2, normalize=normalize
    )
    try:
        step(rows(4, seed=dist.get_rank()))
    except mb.errors.NotYetError as error:
        return type(error).__name__
    return "passed"


def test_policies_that_depend_on_the_split_are_refused_on_all(ranks):
    assert ranks(2, IMPATIENT_S).run(policies, "uniform") == ["NotYetError"] * 2
