"""Every example in a docstring of the package runs as it stands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import shardwright

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(shardwright.__path__, "shardwright.")
    if not module.name.endswith("__main__")
)


@pytest.fixture(autouse=True)
def _world_of_its_own(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    shardwright.init(devices=8)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name in vars(shardwright) if not name.startswith("_")])
def test_public_names_have_an_example(name):
    thing = getattr(shardwright, name)
    if not callable(thing):
        pytest.skip("a module; its examples are in MODULES")
    assert ">>>" in (thing.__doc__ or "")
