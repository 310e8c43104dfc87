"""What every test may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from macrobatch.testing.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., RankPool]]:
    """`ranks(world_size)` is a warm pool of that many ranks, the same for all tests of a pytest process.

    What may leave ranks waiting for each other, if it fails, asks for a pool with a short `timeout_s` of its own.
    Tests with this fixture carry `pytest.mark.xdist_group`, so that under `--dist loadgroup` one worker has all pools.
    """
    pools: dict[tuple[int, float], RankPool] = {}

    def pool(world_size: int, timeout_s: float = 120.0) -> RankPool:
        key = world_size, timeout_s
        if key not in pools:
            pools[key] = RankPool(world_size, timeout_s=timeout_s)
        return pools[key]

    yield pool
    for each in pools.values():
        each.close()
