"""What is read from the environment, and what a bug report says."""

from __future__ import annotations

import pytest
import torch

import macrobatch as mb
from macrobatch import env


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


@pytest.mark.parametrize(
    ("pinned", "siblings", "quota", "expected"),
    [
        (8, "{0}", "", 8),  # no hyper-threads
        (8, "{pair}", "max 100000", 4),  # two threads a core
        (8, "{pair}", "250000 100000", 3),  # a container with two and a half processors
        (8, "", "1000000 100000", 8),  # /sys does not tell; the container has more than the machine
        (1, "{pair}", "50000 100000", 1),
    ],
)
def test_num_cores_counts_neither_hyper_threads_nor_what_is_not_its_own(monkeypatch, pinned, siblings, quota, expected):
    def read(path: str) -> str:
        if path == "/sys/fs/cgroup/cpu.max":
            return quota
        index = int(path.removeprefix("/sys/devices/system/cpu/cpu").partition("/")[0])
        return siblings.format(index, pair=f"{index % 4},{index % 4 + 4}")

    monkeypatch.setattr(env, "_read", read)
    monkeypatch.setattr(env.os, "sched_getaffinity", lambda _: range(pinned), raising=False)
    assert env.num_cores() == expected


def test_num_cores_where_nothing_is_pinned(monkeypatch):
    monkeypatch.delattr(env.os, "sched_getaffinity", raising=False)
    assert 1 <= env.num_cores() <= (env.os.cpu_count() or 1)


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
