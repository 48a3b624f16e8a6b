"""What every test gets: one thread, the same random numbers in every run, and a hypothesis profile.

Under ``SHARDWRIGHT_TEST_SAMPLE=1``, as in ``make test``, a sample of generated cases runs; see :mod:`sampling`.
"""

import random
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from sampling import IS_ON, sampled

torch.set_num_threads(1)  # the values are small, and tests run in several processes

SEED = 20240229


class _TorchRandom:
    """torch's global generator as hypothesis knows it, so that each example of a test draws the same tensors."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> Any:
        return torch.get_rng_state()

    def setstate(self, state: Any) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_torch_random)

hypothesis.settings.register_profile(
    "shardwright",
    deadline=None,  # the first call of an operator is slow, and so is a busy machine
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("shardwright")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Starts every test from the same state of the three global generators, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a sample leaves out: most of many generated cases, and tests that are marked as long."""
    if not IS_ON:
        return
    generated: dict[str, list[pytest.Item]] = {}
    chosen: set[pytest.Item] = set()
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("whole") is None:
            generated.setdefault(item.nodeid.partition("[")[0], []).append(item)
        elif item.get_closest_marker("long") is None:
            chosen.add(item)
    for cases in generated.values():
        short: Sequence[pytest.Item] = [case for case in cases if case.get_closest_marker("long") is None]
        chosen.update(sampled(short, [case.nodeid for case in short]))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
