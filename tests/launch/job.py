"""What the ranks of these tests run: one update, of shares that differ in size. Each prints what it saw as JSON."""

from __future__ import annotations

import json
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import macrobatch as mb
from macrobatch import launch
from macrobatch.ranks import Ranks

NUM_SAMPLES = 3  # fewer than the ranks of the largest test: some have an empty share


def update(ranks: Ranks) -> list[float]:
    """The weights after one update."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(ranks.rank)  # the first rank's weights are the ones that count
    model = nn.Linear(4, 1, dtype=torch.float64)
    model.to(device)
    x = torch.arange(NUM_SAMPLES * 4, dtype=torch.float64).view(NUM_SAMPLES, 4).sin().to(device)
    mine = x[ranks.rank :: ranks.world_size]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, lambda model, x: model(x).exp().mean(), micro_batch=1)
    step(mine if len(mine) else None)
    return model.weight.detach().flatten().tolist()


def main() -> None:
    ranks = launch.init(timeout_s=180)
    assert launch.init() == ranks  # a second call only tells
    seen: dict[str, Any] = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "local_rank": ranks.local_rank,
        "local_world_size": ranks.local_world_size,
        "host": platform.node(),
        "backend": dist.get_backend_config() if dist.is_initialized() else None,
        "arguments": sys.argv[1:],
        "weights": update(ranks),
    }
    sys.stdout.write(json.dumps(seen) + "\n")  # in one piece: the ranks share the output
    sys.stdout.flush()


if __name__ == "__main__":
    main()
