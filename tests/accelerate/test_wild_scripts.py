"""Scripts in the shape of those found in the wild, as they stand under `accelerate`, and with their imports prefixed.

Their windows are full and their batches whole, so that both have to end at the same weights; what they report, which
learning rates they used and which files they left behind is compared as it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.accelerate.doors import ORIGINAL, OURS, entered, reset

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.filterwarnings("ignore")]

SCRIPTS = sorted(Path(__file__).parent.glob("scripts/*.py"))
PREFIX = re.compile(r"^(from|import) accelerate\b", flags=re.MULTILINE)


STAYS = re.compile(r"^(import accelerate|from accelerate\.state import AcceleratorState)$", flags=re.MULTILINE)
"""Of scripts that ask for no more than the version, and whether DeepSpeed is in use."""


def prefixed(source: str) -> str:
    """The whole migration, where accelerate is not installed."""
    return PREFIX.sub(
        lambda found: (
            "from macrobatch.accelerate" if found[1] == "from" else "import macrobatch.accelerate as accelerate"
        ),
        source,
    )


def prefixed_where_it_trains(source: str) -> str:
    """The whole migration, where accelerate is installed: three lines at most."""
    lines = source.splitlines(keepends=True)
    return "".join(line if STAYS.match(line.rstrip()) else prefixed(line) for line in lines)


MIGRATIONS: dict[str, Callable[[str], str]] = {
    ORIGINAL: str,
    OURS: prefixed,
    "macrobatch.accelerate, three lines": prefixed_where_it_trains,
}


def num_changed(source: str, migrated: str) -> int:
    return sum(old != new for old, new in zip(source.splitlines(), migrated.splitlines(), strict=True))


def run(migration: str, script: str, folder: str) -> list[dict[str, Any]]:
    """What the script returns for each of its lists of arguments, one after the other in one folder."""
    source = Path(script).read_text(encoding="utf-8")
    module = types.ModuleType("wild_script")
    sys.modules["wild_script"] = module
    results = []
    with entered(migration.split(",")[0]):
        exec(compile(MIGRATIONS[migration](source), script, "exec"), module.__dict__)
        for arguments in module.RUNS:
            where = ["--output_dir", folder] if "--output_dir" in source else []
            results.append(module.main([*arguments, *where]))
            if dist.is_initialized():
                dist.barrier()
            reset()
    return results


def compare(theirs: Any, ours: Any) -> None:
    for name in theirs:
        if not isinstance(theirs[name], torch.Tensor) and not (
            isinstance(theirs[name], list) and theirs[name] and isinstance(theirs[name][0], torch.Tensor)
        ):
            assert ours[name] == theirs[name], name
        else:
            # Sums of the same float32 numbers in another order, carried through at most 24 updates.
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


PAIRS = [
    (script, migration)
    for script in SCRIPTS
    for migration in ("macrobatch.accelerate", "macrobatch.accelerate, three lines")
    if "three" in migration or STAYS.search(script.read_text(encoding="utf-8"))
]
"""Where both are one and the same, it is run once."""


@pytest.fixture(scope="module")
def results(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, int], list[Any]]:
    """Of all runs of a script on all ranks; of one kind they are made once, whatever they are compared with."""

    @cache
    def of(migration: str, script: Path, num_ranks: int) -> list[Any]:
        arguments = migration, str(script), str(tmp_path_factory.mktemp("wild"))
        return [run(*arguments)] if num_ranks == 1 else ranks(num_ranks).run(run, *arguments)

    return of


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("script", "migration"), PAIRS, ids=lambda value: getattr(value, "stem", value))
def test_same_results(script: Path, migration: str, num_ranks: int, results: Callable[[str, Path, int], list[Any]]):
    theirs, ours = (results(each, script, num_ranks) for each in (ORIGINAL, migration))
    assert len(ours) == num_ranks
    for their_rank, our_rank in zip(theirs, ours, strict=True):
        for their_run, our_run in zip(their_rank, our_rank, strict=True):
            compare(their_run, our_run)


def test_three_lines_are_the_whole_migration():
    counts = {}
    for script in SCRIPTS:
        source = script.read_text(encoding="utf-8")
        counts[script.stem] = num_changed(source, prefixed_where_it_trains(source))
    assert max(counts.values()) == counts["diffusion"] == 3


def test_sed_migrates_as_the_page_has_it(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "accelerate.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ sed -E -i '(.+)' train\.py$", page, flags=re.MULTILINE)
    source = next(script for script in SCRIPTS if script.stem == "diffusion").read_text(encoding="utf-8")
    script = tmp_path / "train.py"
    found = []
    for command in commands:
        script.write_text(source, encoding="utf-8")
        subprocess.run(["sed", "-E", "-i", command, str(script)], check=True)
        found.append(script.read_text(encoding="utf-8"))
    assert found == [prefixed_where_it_trains(source), prefixed(source)]
    assert [num_changed(source, migrated) for migrated in found] == [3, 5]


def test_scripts_name_the_original_only_in_imports():
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        rest = PREFIX.sub("", script.read_text(encoding="utf-8"))
        assert not re.search(r"macrobatch|from accelerate|import accelerate", rest)
