"""Loggers over ranks: who speaks, in which order, from which line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from macrobatch.accelerate.logging import MultiProcessAdapter, get_logger
from macrobatch.accelerate.state import PartialState
from macrobatch.accelerate.utils.environment import patch_environment
from tests.accelerate.doors import ORIGINAL, OURS

pytestmark = pytest.mark.xdist_group("ranks")


def spoken(door: str, path: Path) -> None:
    """What both ranks write to one file."""
    state, rank = import_module(f"{door}.state"), dist.get_rank()
    with patch_environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2):
        state.AcceleratorState._reset_state(True)
        state.PartialState(cpu=True)
    logger = import_module(f"{door}.logging").get_logger(f"test.{door}", log_level="INFO")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(f"{rank} %(funcName)s %(message)s"))
    logger.logger.addHandler(handler)
    try:
        logger.info("main only")
        logger.info("all in order", in_order=True, main_process_only=False)
        logger.debug("nobody", main_process_only=False)
        dist.barrier()
        logger.info("all", main_process_only=False)
    finally:
        logger.logger.removeHandler(handler)
        handler.close()
        state.AcceleratorState._reset_state(True)


def test_ranks_speak_as_in_the_original(tmp_path: Path, ranks: Callable[..., Any]):
    lines = {}
    for door in (ORIGINAL, OURS):
        ranks(2).run(spoken, door, tmp_path / door)
        written = (tmp_path / door).read_text(encoding="utf-8").splitlines()
        lines[door] = [*written[:3], *sorted(written[3:])]
    assert lines[OURS] == lines[ORIGINAL]
    assert lines[OURS] == [
        "0 spoken [RANK 0] main only",
        "0 spoken [RANK 0] all in order",
        "1 spoken [RANK 1] all in order",
        "0 spoken [RANK 0] all",
        "1 spoken [RANK 1] all",
    ]


def test_warning_once_is_once(caplog: pytest.LogCaptureFixture):
    PartialState()
    logger = get_logger("test.once")
    for _ in range(3):
        logger.warning_once("careful")
    logger.warning_once("careful again")
    assert [record.getMessage() for record in caplog.records] == ["[RANK 0] careful", "[RANK 0] careful again"]


def test_record_names_the_callers_line(caplog: pytest.LogCaptureFixture):
    PartialState()
    get_logger("test.line").warning("here: %s", 1)
    (record,) = caplog.records
    assert (record.funcName, record.getMessage()) == ("test_record_names_the_callers_line", "[RANK 0] here: 1")


def test_level_comes_from_argument_or_environment():
    with patch_environment(ACCELERATE_LOG_LEVEL="error"):
        assert get_logger("test.environment").logger.level == logging.ERROR
        assert get_logger("test.argument", log_level="debug").logger.level == logging.DEBUG
    assert isinstance(get_logger("test.none"), MultiProcessAdapter)
    assert get_logger("test.none").logger.level == logging.NOTSET


def test_message_before_the_ranks_are_known_is_refused():
    with pytest.raises(RuntimeError, match="construct Accelerator"):
        get_logger("test.early").info("too early")
