"""What every test may ask for, and which tests share a worker."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from macrobatch.testing.pool import RankPool

os.environ["MACROBATCH_CACHE"] = ""  # no test is to find, or to leave, what was measured on this machine

ROOT = Path(__file__).parents[1]
GROUP = re.compile(r'pytest\.mark\.xdist_group\("(\w+)"\)')


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., RankPool]]:
    """`ranks(world_size)` is a warm pool of that many ranks, the same for all tests of a pytest process.

    What may leave ranks waiting for each other, if it fails, asks for a pool with a short `timeout_s` of its own.
    Tests with this fixture carry `pytest.mark.xdist_group("ranks")`, so that a worker that has pools has much use of
    them: all such tests of a folder.
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


def pytest_collection_finish() -> None:
    """What was imported and collected stays, so that no garbage collection need go through it: that takes most of a
    second each time, and some tests collect often."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadgroup`: files with tests of one group go to one worker as a whole; those over ranks by folder,
    since together they take longer than all the rest.

    pytest 9.2 no longer lets pytest-xdist 3.8 pass groups on, which then spreads them in silence
    (https://github.com/pytest-dev/pytest-xdist/issues/1386).
    """
    from xdist.scheduler import LoadGroupScheduling

    if config.getvalue("dist") != "loadgroup":
        return None
    found = {path: GROUP.search(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py")}
    groups = {
        path.relative_to(ROOT).as_posix(): f"ranks of {path.parent.name}" if group[1] == "ranks" else group[1]
        for path, group in found.items()
        if group is not None
    }

    class Scheduling(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups.get(nodeid.split("::")[0]) or super()._split_scope(nodeid)

    return Scheduling(config, log)
