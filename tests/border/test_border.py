"""Nothing is silent at the border of capture: what a piece of code does is computed as on one device, or refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jobs
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import border  # noqa: E402
import pieces  # noqa: E402

import shardwright as sw  # noqa: E402

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
KINDS = len(pieces.EQUAL) + len(pieces.REFUSED)
SIMULATED = range(1000) if ALL else range(0, KINDS, 3)
ON_RANKS = range(KINDS, 3 * KINDS) if ALL else range(KINDS, KINDS + 24)


@pytest.mark.whole
@pytest.mark.parametrize("number", SIMULATED)
def test_equal_or_refused(number):
    sw.init(devices=(2, 3, 4)[number % 3])
    case = border.case(number)
    found = border.outcome(case)
    assert found.partition(":")[0] in case.must_be, f"{case}\n{found}"
    if found.startswith("refused: "):  # and not what one device raises itself
        assert ".py:" in found or "hook" in found or "create_graph" in found, found  # the user's line, or the module


def test_on_real_ranks(tmp_path):
    text = jobs.script(tmp_path, HERE / "border_job.py", 2, str(ON_RANKS.start), str(ON_RANKS.stop), seconds=900)
    assert text.count("as it must") == len(ON_RANKS), text
