"""Gathers the strategies given to modules and parameters, by name or on the modules themselves."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import Any

from torch import nn

from shardwright.api.settings import Settings
from shardwright.capture.attributes import check_attributes
from shardwright.capture.closure import FunctionModule
from shardwright.errors import Problems, ShardwrightError
from shardwright.ir.marks import Mark
from shardwright.ops import check_strategies
from shardwright.train.recompute.request import RecomputeRequest, gather_requests

MARK = "_shardwright_mark"


def gather_marks(root: nn.Module, settings: Settings) -> tuple[dict[nn.Module, Mark], dict[str, tuple[Any, str]]]:
    """Gathers the marks on the root's modules, and parameters' layouts by qualified name."""
    problems = Problems()
    marks: dict[nn.Module, Mark] = {}
    plan: dict[str, tuple[Any, str]] = {}
    names = {id(p): n for n, p in reversed(list(root.named_parameters(remove_duplicate=False)))}
    for path, module in root.named_modules():
        mark = module.__dict__.get(MARK)
        if mark is not None:
            marks[module] = replace(mark, module_path=path)
    for pattern, strategy in (settings.strategies or {}).items():
        _match(root, pattern, strategy, settings.source, marks, plan, problems, settings.of_step)
    for module, mark in marks.items():
        own = dict(module.named_parameters(remove_duplicate=False))
        for name, entry in (mark.parameter_plan or {}).items():
            name = name.removeprefix("self.")
            what = f"{mark.name} {mark.module_path}".strip() + (f" at {mark.source}" if mark.source else "")
            if name not in own:
                close = ", ".join(list(own)[:6]) or "none"
                problems.add(f"{what}: parameter_plan names {name!r}, which is not a parameter of it; it has {close}")
            else:
                plan[names[id(own[name])]] = (entry, what)
    problems.raise_if_any("the strategies cannot be followed")
    return marks, plan


def gather_recompute(root: nn.Module, settings: Settings) -> dict[str, RecomputeRequest]:
    """Gathers recompute requests by module path, from the settings and from modules' own marks."""
    return gather_requests(root, settings.recompute, _fits, settings.of_step)


def check_patterns(step: nn.Module, settings: Settings) -> None:
    """Refuses patterns that match nothing in any module that a train step reaches.

    Names count from the step and from the root of each of its modules.
    """
    names = [n for n, _ in step.named_modules() if n] + [n for n, _ in step.named_parameters(remove_duplicate=False)]
    if not names:
        return  # the step finds its modules only as it runs
    problems = Problems()
    for pattern in settings.strategies or {}:
        if not any(_fits(step, n, pattern) for n in names):
            problems.add(f"strategies: {pattern!r} at {settings.source} matches no module and no parameter of the step")
    problems.raise_if_any("the strategies cannot be followed")


def _fits(root: nn.Module, name: str, pattern: str) -> bool:
    """Tells whether a pattern names a module or parameter; of a function, also counted from a module that it reads."""
    if fnmatch.fnmatchcase(name, pattern):
        return True
    inner = name.partition(".")[2]
    return isinstance(root, FunctionModule) and bool(inner) and fnmatch.fnmatchcase(inner, pattern)


def _match(
    root: nn.Module,
    pattern: str,
    strategy: Any,
    source: str,
    marks: dict[nn.Module, Mark],
    plan: dict[str, tuple[Any, str]],
    problems: Problems,
    of_step: bool,
) -> None:
    modules = [(p, m) for p, m in root.named_modules() if p and _fits(root, p, pattern)]
    first: dict[int, str] = {}  # a tied weight is planned by its first name, and may be called by any
    for name, parameter in root.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    fitting = [p for n, p in root.named_parameters(remove_duplicate=False) if _fits(root, n, pattern)]
    parameters = list(dict.fromkeys(first[id(p)] for p in fitting))
    if not modules and not parameters and not of_step:
        known = ", ".join([p for p, _ in root.named_modules() if p][:6]) or "none: mark the module itself, sw.shard(module)"
        problems.add(f"strategies: {pattern!r} at {source} matches no module and no parameter; modules are {known}")
    for path, module in modules:
        given = strategy if isinstance(strategy, dict) else {"in_strategy": strategy}
        unknown = set(given) - {"in_strategy", "out_strategy", "parameter_plan", "attributes"}
        if unknown:
            problems.add(f"strategies: {pattern!r} at {source} has the keys {sorted(unknown)}; use in_strategy, "
                         "out_strategy, parameter_plan, attributes")  # fmt: skip
            continue
        try:
            check_strategies(given.get("in_strategy"), given.get("out_strategy"))
        except ShardwrightError as error:
            problems.add(f"strategies: {pattern!r} at {source}: {error}")
            continue
        given = {**given, "attributes": check_attributes(f"strategies: {pattern!r} at {source}", given.get("attributes"))}
        marks[module] = Mark(type(module).__name__, **given, source=source, module_path=path)
    if not modules:
        for name in parameters:
            plan[name] = (strategy, f"strategies {pattern!r} at {source}")
