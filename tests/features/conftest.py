"""What tests of features share."""

from __future__ import annotations

import pytest

import shardwright as sw


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four simulated ranks, for one test."""
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=4)
