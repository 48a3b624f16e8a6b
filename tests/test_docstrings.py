"""Every example in a docstring of the package runs as it stands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import shardwright
from shardwright.rules.registry import _RULES
from shardwright.rules.traits import _ROWS

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(shardwright.__path__, "shardwright.")
    if not module.name.endswith("__main__")
)


@pytest.fixture(autouse=True)
def _state_of_its_own(monkeypatch):
    """Examples set up worlds and register rules."""
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.setattr("shardwright.rules.registry._RULES", dict(_RULES))
    monkeypatch.setattr("shardwright.rules.traits._ROWS", dict(_ROWS))
    shardwright.init(devices=8)


@pytest.mark.whole
@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.whole
@pytest.mark.parametrize("name", [n for n, thing in vars(shardwright).items() if n[0] != "_" and callable(thing)])
def test_public_names_have_an_example(name):
    assert ">>>" in (getattr(shardwright, name).__doc__ or "")
