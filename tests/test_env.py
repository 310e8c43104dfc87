"""What is read from the environment, and what a bug report says."""

from __future__ import annotations

import pytest
import torch

import macrobatch as mb
from macrobatch import env
from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        ("On", True),
        ("0", False),
        ("false", False),
        ("no", False),
        ("", False),
    ],
)
def test_debug_reads_its_variable(value, expected):
    assert env.debug({"MACROBATCH_DEBUG": value}) is expected


def test_debug_unset_is_off():
    assert env.debug({}) is False


def test_debug_follows_the_process_environment(monkeypatch):
    monkeypatch.delenv("MACROBATCH_DEBUG", raising=False)
    assert env.debug() is False
    monkeypatch.setenv("MACROBATCH_DEBUG", "1")
    assert env.debug() is True


@pytest.mark.parametrize("environ", [{}, {"PATH": "/bin"}, {"LOCAL_RANK": "3"}, {"LOCAL_WORLD_SIZE": "2"}], ids=str)
def test_ranks_without_torchrun_is_alone(environ):
    assert env.ranks(environ) == Ranks()


def test_ranks_reads_what_torchrun_sets():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"}
    assert env.ranks(environ) == Ranks(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_ranks_without_local_numbers_means_one_machine():
    assert env.ranks({"RANK": "2", "WORLD_SIZE": "3"}) == Ranks(rank=2, world_size=3, local_rank=2, local_world_size=3)


def test_ranks_follows_the_process_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert env.ranks() == Ranks()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert env.ranks().rank == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1.0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "a"},
    ],
    ids=str,
)
def test_ranks_incomplete_or_no_numbers_is_refused_showing_them(environ):
    with pytest.raises(
        ArgumentError, match=r"environment: given .*RANK and WORLD_SIZE as integers.*torchrun"
    ) as caught:
        env.ranks(environ | {"HOME": "/root"})
    assert caught.value.given == environ  # nothing else of the environment is shown


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_together_are_refused(environ):
    with pytest.raises(ArgumentError, match="0 <= rank < world_size"):
        env.ranks(environ)


def test_description_names_versions_and_devices():
    found = env.description()
    assert found["macrobatch"] == mb.__version__
    assert found["torch"] == torch.__version__
    assert "torch threads" in found["cpu"]
    assert all(isinstance(text, str) and text for text in found.values())
    assert sum(name.startswith("cuda:") for name in found) == torch.cuda.device_count()


def test_description_names_missing_packages_as_such(monkeypatch):
    def missing(package: str) -> str:
        raise env.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(env.metadata, "version", missing)
    assert env.description()["numpy"] == "not installed"
