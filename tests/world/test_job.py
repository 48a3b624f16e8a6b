"""The same programs on real gloo processes."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest

SCRIPT = Path(__file__).with_name("job_programs.py")


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)])
def test_programs_on_real_ranks(ranks, tmp_path):
    text = jobs.script(tmp_path, SCRIPT, ranks)
    passed = [line for line in text.splitlines() if line.startswith("passed")]
    assert len(passed) == 15, passed
