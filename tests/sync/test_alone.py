"""A process that was started as one of several and has not joined them trains a model of its own: it is told so."""

from __future__ import annotations

import logging

import pytest
from torch import nn

from macrobatch.sync import LocalSync, make_sync


@pytest.mark.parametrize(
    ("world_size", "sync", "warns"),
    [("2", "auto", True), ("2", "local", False), ("1", "auto", False), (None, "auto", False), ("many", "auto", False)],
)
def test_started_together_and_not_joined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, world_size: str | None, sync: str, warns: bool
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with caplog.at_level(logging.WARNING, logger="macrobatch"):
        assert isinstance(make_sync(sync, nn.Linear(1, 1)), LocalSync)
    assert [record.getMessage() for record in caplog.records if "launch.init()" in record.getMessage()] == [
        "sync: 2 processes were started together, and this one has joined none of the others, so it trains a model of "
        'its own. Call macrobatch.launch.init() first, or pass sync="local" if that is meant'
    ] * warns
