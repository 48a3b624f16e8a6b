"""What ``benchmarks/plan_quality.py`` checks, in a size for every run."""

from __future__ import annotations

import plan_quality
import pytest
import truth_models
from plan_zoo import REFERENCES

import shardwright as sw


def test_searches_are_near_the_best():
    assert not plan_quality.gaps(["mlp", "two towers", "cnn", "unet", "tagger", "large gpt"])


@pytest.mark.long
def test_searches_find_the_best_of_all_assignments():
    assert not plan_quality.brute(60)


def test_the_integer_program_agrees():
    assert not plan_quality.referee(12, zoo=("mlp",))


@pytest.mark.parametrize("name", REFERENCES)
def test_experts_know_no_better_plan(name):
    assert not plan_quality.rediscovery([name])


def test_known_plans_of_the_benchmark_are_what_they_are_called():
    """The best by measurement is of no use against plans that are not what an expert would write."""
    subject = truth_models.SUBJECTS["gpt"]
    layout = sw.Layout((4,), ("tp",))
    model = subject.make()
    settings = sw.AutoParallel(model).shard(subject.tensor_parallel(layout, "None")).settings
    plan = sw.plan_for(4, model, *subject.inputs(4), machine="cpu-gloo", mode="semi_auto", settings=settings)
    stored = {name: str(price.layout) for name, price in plan.price.parameters.items()}
    for block in ("blocks.0", "blocks.1"):
        assert stored[f"{block}.attention.q.weight"].startswith("tp,None")
        assert stored[f"{block}.attention.proj.weight"].startswith("None,tp")
        assert stored[f"{block}.down.weight"].startswith("None,tp")
    own = [name for name, price in plan.price.operators.items() if price.collectives and name.startswith("linear")]
    assert len(own) == 4  # the sums of two products a block
