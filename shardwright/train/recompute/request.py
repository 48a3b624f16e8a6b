"""User's requests to compute modules again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwright.errors import ArgumentTypeError, Problems, ShardwrightError

REQUEST = "_shardwright_recompute"  # attribute of a module that is marked itself

AUTO = "auto"

_SWITCHES = ("mp_comm_recompute", "parallel_optimizer_comm_recompute", "recompute_slice_activation")


@dataclass(frozen=True)
class RecomputeRequest:
    """Modules that are computed again, and how.

    Args:
        targets: name patterns and modules; ``("auto",)``: a memory limit decides what to compute again.
        mp_comm_recompute: whether collectives inside the modules are repeated too, or their results kept.
        parallel_optimizer_comm_recompute: whether parameters are gathered a second time too, or kept since the forward.
        recompute_slice_activation: whether ranks that hold the same keep slices of what is kept.
        memory: bytes that a rank may use over a step; ``"auto"`` only.
        source: the user's line that asked for it.
    """

    targets: tuple[str | nn.Module, ...] = ()
    mp_comm_recompute: bool = True
    parallel_optimizer_comm_recompute: bool = False
    recompute_slice_activation: bool = False
    memory: float | None = None
    source: str = ""

    @property
    def is_automatic(self) -> bool:
        return AUTO in self.targets


def request_for(
    what: str, targets: Any, source: str, switches: dict[str, Any], memory: float | None = None
) -> RecomputeRequest:
    """Builds a request from the user's arguments.

    Args:
        what: the call, for messages.
        targets: name patterns and modules, or ``"auto"``.
        source: the user's line.
        switches: the keyword arguments.
        memory: bytes that a rank may use over a step.

    Raises:
        ShardwrightError: an unknown keyword; no target.
        ArgumentTypeError: a switch that is no bool, a target that is neither a pattern nor a module.
    """
    unknown = sorted(set(switches) - set(_SWITCHES))
    if unknown:
        raise ShardwrightError(f"{what}: {', '.join(unknown)} is no setting of it; use {', '.join(_SWITCHES)}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ArgumentTypeError(f"{what}: {name}={value!r}; give True or False")
    if isinstance(targets, (str, nn.Module)):
        targets = (targets,)
    if not isinstance(targets, Iterable):
        raise ArgumentTypeError(f"{what}: {targets!r}; give a name pattern, a module, several of these, or 'auto'")
    found = tuple(targets)
    for target in found:
        if not isinstance(target, (str, nn.Module)):
            raise ArgumentTypeError(f"{what}: {target!r} is a {type(target).__name__}; give name patterns or modules")
    if not found or "" in found:
        raise ShardwrightError(f"{what}: {targets!r} names no module; give a pattern such as 'layers.*'")
    if AUTO in found and len(found) > 1:
        raise ShardwrightError(f"{what}: 'auto' decides for all modules; give it alone, or patterns alone")
    if memory is not None and AUTO not in found:
        raise ShardwrightError(
            f"{what}: memory={memory:g} decides what 'auto' computes again; give recompute('auto', memory=...)"
        )
    return RecomputeRequest(found, **switches, memory=memory, source=source)


def gather_requests(
    root: nn.Module, requests: Sequence[RecomputeRequest], fits: Callable[[nn.Module, str, str], bool], of_step: bool
) -> dict[str, RecomputeRequest]:
    """Gathers the requests by module path, from modules themselves and from name patterns.

    Args:
        root: the module.
        requests: of the settings.
        fits: tells whether a pattern names a module of a root.
        of_step: whether the root is a part of a train step: a pattern may be another part's.

    Raises:
        StrategyError: a pattern that matches nothing, a module that is not there.
    """
    modules = list(root.named_modules(remove_duplicate=False))
    found = {path: module.__dict__[REQUEST] for path, module in modules if REQUEST in module.__dict__}
    problems = Problems()
    for request in requests:
        for target in request.targets if not request.is_automatic else ():
            if isinstance(target, str):
                paths = [path for path, _ in modules if path and fits(root, path, target)]
            else:
                paths = [path for path, module in modules if module is target]
            if not paths and not of_step:
                known = ", ".join([path for path, _ in modules if path][:6]) or "none: give the module itself"
                name = repr(target) if isinstance(target, str) else type(target).__name__
                problems.add(f"recompute: {name} at {request.source} matches no module; modules are {known}")
            found.update(dict.fromkeys(paths, request))
    problems.raise_if_any("what to compute again cannot be found")
    return found
