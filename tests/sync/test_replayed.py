"""Replayed micro-steps on several ranks: the reduction follows the replay, whatever the strategy would rather do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import macrobatch as mb
from macrobatch import tree
from macrobatch.plan.graphs import Graphs
from macrobatch.testing.models import CASES
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error
from tests.plan.tape import Tape

pytestmark = pytest.mark.xdist_group("ranks")

NUM_SAMPLES = 17
SHARES = {"even": [9, 8], "uneven": [2, 15], "one rank empty": [17, 0]}


def errors(kind: str, verifies: bool) -> dict[str, list[float]]:
    """Of five windows, by how the samples are shared. Runs on a rank."""
    found = {}
    for name, shares in SHARES.items():
        torch.manual_seed(3)
        case = CASES[kind](NUM_SAMPLES)
        batch = tree.map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, case.batch)
        model = case.model.double()
        reference = full_batch_gradient(model, case.loss_fn, batch)
        tape = Tape()
        step = mb.TrainStep(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            case.loss_fn,
            micro_batch=3,
            capture=Graphs(tape, verifies=verifies),
            sync=mb.ReplicatedSync(bucket_bytes=256),  # many buckets, sent early if anything were
        )
        start = sum(shares[: dist.get_rank()])
        share = tree.select(batch, slice(start, start + shares[dist.get_rank()])) if shares[dist.get_rank()] else None
        found[name] = []
        for _ in range(5):
            step(share)
            gradients: dict[str, Tensor | None] = gradients_of(model)
            found[name].append(relative_error(gradients, reference))
        assert (tape.num_replays > 0) == (shares[dist.get_rank()] > 0)
    return found


@pytest.mark.parametrize("verifies", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "tied_lm", "lora"])
def test_replayed_windows_over_ranks_equal_the_full_batch(ranks, kind, verifies):
    for found in ranks(2).run(errors, kind, verifies):
        assert all(error <= 1e-12 for each in found.values() for error in each), found  # float64
