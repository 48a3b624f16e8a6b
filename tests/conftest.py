"""What every test gets: one thread, the same random numbers in every run, and a hypothesis profile."""

import random
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

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
