"""A plan and the run of the same script are one and the same: their programs are compared as texts, for every example."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shardwright.api.auto_parallel import AutoParallel
from shardwright.api.plan_for import planning
from shardwright.cli.script import run_script
from shardwright.errors import ShardwrightError
from shardwright.ir.program import LocalProgram
from shardwright.partition.local_program import local_program
from shardwright.pipeline.pipeline_plan import PipelinePlan
from shardwright.world.current import current_world, init

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What trains no AutoParallel when it is run, or one that its writer planned.
WITHOUT_A_PLAN = {
    "language_common": "what examples share",
    "mnist_common": "what examples share",
    "propagation_common": "what examples share",
    "digits": "reads digits",
    "llama": "a model for the command line, too large to run",
    "deepseek_moe": "a model for the command line, too large to run",
    "hybrid_parallel": "its writer made the plan",
}
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


class _Stop(BaseException):
    """Ends a script at its first program."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("DATA_PATH", "RANK", "WORLD_SIZE", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.setattr(sys, "path", [*sys.path])


def program_of_the_plan(script: str, devices: int) -> str:
    with planning(devices, None, meta=False, options={"machine": "cpu-gloo", "memory": float("inf")}) as plans:
        run_script(script, "__main__")
    plan = plans[0]
    return text_of_stages(plan) if isinstance(plan, PipelinePlan) else local_program(plan.value).text(0)


def text_of_stages(plan: PipelinePlan) -> str:
    return "\n".join(program.text(0) for stage in plan.planned for program in (stage.parts.once, *stage.parts.each))


def program_of_the_run(script: str, monkeypatch: pytest.MonkeyPatch) -> tuple[LocalProgram, str]:
    found: list[tuple[LocalProgram, str]] = []
    plain = AutoParallel._compile

    def stop(self: AutoParallel, *args: object) -> None:
        bound = plain(self, *args)
        is_pipeline = isinstance(bound.view, PipelinePlan)
        found.append((bound.program, text_of_stages(bound.view) if is_pipeline else bound.program.text(0)))
        raise _Stop

    init(8)  # where the script says nothing else
    with monkeypatch.context() as patch:
        patch.setattr(AutoParallel, "_compile", stop)
        with pytest.raises(_Stop):
            run_script(script, "__main__")
    return found[0]


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # Lightning asks so
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in WITHOUT_A_PLAN])
def test_a_plan_is_that_of_the_run(name, monkeypatch):
    script = str(EXAMPLES / f"{name}.py")
    run, text = program_of_the_run(script, monkeypatch)
    assert program_of_the_plan(script, current_world().size) == text
    assert run.moves or run.text(0) != text  # the first stage of a pipeline may be on one rank


def test_what_has_no_plan_is_still_there():
    assert WITHOUT_A_PLAN.keys() <= set(SCRIPTS)
    with pytest.raises(ShardwrightError, match="a hybrid_parallel program is not planned"):
        program_of_the_plan(str(EXAMPLES / "hybrid_parallel.py"), 8)
