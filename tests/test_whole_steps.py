"""What steps take, from the times of all turns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from shardwright.calibrate.timing import undisturbed


def test_turns_in_which_others_used_the_machine_do_not_count():
    times = [5.0, 5.0, 1.0, 1.0, 1.2, 1.2, 0.2, 0.2]
    assert undisturbed(times, [0.5, 0.0, 0.05, 0.9]) == pytest.approx(1.0)
    assert undisturbed(times[:4], [0.9, 0.8]) == pytest.approx(1.0), "half of the turns are left whatever they are"


def test_delays_have_no_say():
    steps = [1.0, 1.1, 1.0, 1.1, 1.0, 1.1]
    assert undisturbed([*steps, 9.0, 7.0], [0.0] * 4) == pytest.approx(undisturbed([*steps, 1.2, 1.2], [0.0] * 4))


def test_two_halves_of_the_turns_order_plans_alike():
    draw = np.random.default_rng(0)
    true = np.linspace(20.0, 40.0, 25)
    # quiet throughout, now and then a rank waits for its turn on a core
    times = true[:, None] * (1 + 0.1 * draw.exponential(size=(25, 24)))
    foreign = np.abs(0.02 * draw.standard_normal((25, 12)))
    half = [
        [undisturbed(row.reshape(12, 2)[part::2].ravel().tolist(), f[part::2].tolist()) for row, f in zip(times, foreign)]
        for part in (0, 1)
    ]
    assert spearmanr(*half).statistic > 0.98
