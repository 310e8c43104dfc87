"""Loggers: one line for each call, on the ranks that are asked to."""

from __future__ import annotations

import logging

import pytest

from macrobatch.colossalai.context import ParallelMode
from macrobatch.colossalai.logging import disable_existing_loggers, get_dist_logger


@pytest.fixture
def logger(request):
    name = f"colossalai.{request.node.name}"
    yield get_dist_logger(name)
    for handler in logging.getLogger(name).handlers[1:]:
        handler.close()


def test_one_line_for_each_call_that_ends_with_the_message(logger, capfd):
    logger.info("iteration 0, first 10 elements of param: tensor([100%])")
    logger.warning({"a": 1})
    logger.error("bad")
    logger.debug("not said")
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(" - ")[2] for line in err.splitlines()] == [
        "INFO: iteration 0, first 10 elements of param: tensor([100%])",
        "WARNING: {'a': 1}",
        "ERROR: bad",
    ]


def test_handlers_of_the_root_do_not_say_it_again(logger, capsys):
    root = logging.StreamHandler()  # as of logging.basicConfig
    logging.getLogger().addHandler(root)
    try:
        logger.info("once")
    finally:
        logging.getLogger().removeHandler(root)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_logger_of_a_name_is_one():
    assert get_dist_logger() is get_dist_logger("colossalai")
    assert get_dist_logger("colossalai.other") is not get_dist_logger()


def test_levels(logger, capsys):
    logger.set_level("DEBUG")
    logger.debug("details")
    logger.set_level("ERROR")
    logger.warning("nothing")
    assert capsys.readouterr().err.endswith("DEBUG: details\n")
    with pytest.raises(ValueError, match="DEBUG or INFO"):
        logger.set_level("LOUD")


def test_only_on_some_ranks(logger, capsys):
    logger.info("here", ranks=[0])
    logger.info("elsewhere", ranks=[1])
    logger.info("here too", parallel_mode=ParallelMode.TENSOR, ranks=[0])
    assert [line.rsplit(": ")[-1] for line in capsys.readouterr().err.splitlines()] == ["here", "here too"]


def test_a_file_of_each_rank(logger, tmp_path):
    folder = tmp_path / "logs" / "today"
    logger.log_to_file(folder, suffix="run")
    logger.log_to_file(folder, suffix="run")  # not twice
    logger.log_to_file(folder, level="ERROR")
    logger.info("to the file")
    assert (folder / "rank_0_run.log").read_text().splitlines() == [f"colossalai - {logger._name} - INFO: to the file"]
    assert (folder / "rank_0.log").read_text() == ""
    with pytest.raises(ValueError, match="mode"):
        logger.log_to_file(folder, mode="x")


def test_a_record_names_its_caller(logger):
    seen = []
    logger._logger.addFilter(lambda record: seen.append(record.filename) or True)
    logger.info("from here")
    assert seen == ["test_logging.py"]


def test_other_packages_can_be_quietened():
    noisy, kept = logging.getLogger("colossalai_test_noisy"), logging.getLogger("colossalai_test_kept")
    disable_existing_loggers(include=["colossalai_test_noisy"])
    assert (noisy.level, kept.level) == (logging.WARNING, logging.NOTSET)


def job_of_logging(folder):
    """On every rank: two messages to its file."""
    logger = get_dist_logger("colossalai.ranks")
    logger.log_to_file(folder, mode="w")
    logger.info("all")
    logger.info("first", parallel_mode=ParallelMode.DATA, ranks=[0])


@pytest.mark.xdist_group("ranks")
def test_two_ranks(ranks, tmp_path):
    ranks(2).run(job_of_logging, str(tmp_path))
    lines = [(tmp_path / f"rank_{rank}.log").read_text().splitlines() for rank in range(2)]
    assert [[line.split(": ")[1] for line in each] for each in lines] == [["all", "first"], ["all"]]
