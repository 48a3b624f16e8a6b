"""Verify: compares the parallel program with the single device, down to the first operator that differs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.api.auto_parallel import AutoParallel
from shardwright.api.bound import BoundCall
from shardwright.base.torch_private import pytree
from shardwright.errors import ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.ir.operator import Slot
from shardwright.parameters.whole import full_value
from shardwright.testing.difference import difference
from shardwright.world.simulated.bind import gather_rank_groups
from shardwright.world.simulated.world import SimulatedWorld

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Verification:
    """A result of :func:`verify`.

    Args:
        outputs, gradients: name -> its difference beyond the tolerance, or ``None``.
        first_operator: the first operator, in the order of the program, whose output differs.
    """

    outputs: dict[str, str | None]
    gradients: dict[str, str | None]
    first_operator: str | None = None

    @property
    def ok(self) -> bool:
        return not any((*self.outputs.values(), *self.gradients.values()))

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"matches single device: {len(self.outputs)} outputs, {len(self.gradients)} gradients"
        lines = ["differs from single device:"]
        for kind, found in (("output", self.outputs), ("gradient", self.gradients)):
            lines += [f"  {kind} {name}: {problem}" for name, problem in found.items() if problem]
        if self.first_operator:
            lines.append(f"  first operator that differs: {self.first_operator}")
        return "\n".join(lines)


def verify(target: Any, *inputs: Any, tolerance: float | None = None, **kwargs: Any) -> Verification:
    """Runs a callable in parallel and on a single device, and compares. Inputs and random state are the same.

    Args:
        target: a module, a forward function or an :class:`AutoParallel` of one. Its parameters are not changed and
            their ``.grad`` is left alone.
        inputs, kwargs: global inputs of one call.
        tolerance: largest relative difference; default by dtype (1e-10 in float64, 1e-4 in float32, 3e-2 in bfloat16).

    Returns:
        A :class:`Verification`: true where everything agrees, printable, and naming the first operator that differs.

    Raises:
        ShardwrightError: the target is a train step, which changes its parameters.

    >>> layer = torch.nn.Linear(4, 2)
    >>> print(verify(layer, torch.ones(8, 4)))
    matches single device: 1 outputs, 2 gradients
    """
    net = target if isinstance(target, AutoParallel) else AutoParallel(target)
    if net._is_step:
        raise ShardwrightError("verify needs a module or a forward function: a train step changes its parameters")
    leaves, compiled = net._bound_call_for(inputs, kwargs)
    root = compiled.root
    state = torch.get_rng_state()
    names = [n for n, p in root.named_parameters() if p.requires_grad]
    parameters = dict(root.named_parameters())
    whole = {n: full_value(p).detach() for n, p in parameters.items()}
    buffers = {n: b.clone() for n, b in root.named_buffers()}

    single_parameters = {n: nn.Parameter(v.clone(), parameters[n].requires_grad) for n, v in whole.items()}

    def single() -> Any:
        device = next((v.device.type for v in whole.values()), "cpu")
        with compiled.single_device(), net.settings.precision.computing(device):
            return torch.func.functional_call(root, {**single_parameters, **_copies(buffers)}, inputs, kwargs)

    expected = _run(single, [single_parameters[n] for n in names], state)
    got = _run(lambda: compiled(leaves), [parameters[n] for n in names], state)
    _restore(root, buffers)
    limit = tolerance if tolerance is not None else _tolerance(compiled.graph)
    outputs = {f"{i}": difference(e, g, limit) for i, (e, g) in enumerate(zip(expected[0], got[0], strict=True))}
    floor = _rounding(expected[1]) / limit
    gradients = {
        n: difference(e, None if g is None else full_value(g), limit, floor)
        for n, e, g in zip(names, expected[1], got[1], strict=True)
    }
    report = Verification(outputs, gradients)
    if not report.ok and compiled.program.places:
        report = replace(report, first_operator=_first_difference(compiled, whole, buffers, leaves, state, limit))
    torch.set_rng_state(state)
    return report


def _copies(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in buffers.items()}


def _restore(root: nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in root.named_buffers():
            buffer.copy_(buffers[name])


def _run(call: Callable[[], Any], parameters: list[Tensor], state: Tensor) -> tuple[list[Tensor], list[Any]]:
    """Runs a call. Returns its tensor outputs and the gradients of a fixed weighting of them.

    A single output that is a scalar, such as a loss, is weighted by 1.
    """
    torch.set_rng_state(state)
    with torch.enable_grad():
        outputs = [o for o in pytree.tree_leaves(call()) if isinstance(o, Tensor)]
        terms = []
        generator = torch.Generator().manual_seed(0)
        for output in outputs:
            if output.requires_grad:
                weight = torch.rand(output.shape, generator=generator, dtype=torch.float64) if output.ndim else None
                terms.append(output if weight is None else (output * weight.to(output)).sum())
        if not terms or not parameters:
            return [o.detach() for o in outputs], [None] * len(parameters)
        gradients = torch.autograd.grad(sum(terms[1:], terms[0]), parameters, allow_unused=True)
    return [o.detach() for o in outputs], list(gradients)


def _tolerance(graph: Graph) -> float:
    floating = {meta.dtype for meta in graph.metas.values() if meta.dtype.is_floating_point}
    return max((TOLERANCE.get(d, 1e-4) for d in floating), default=1e-10)


def _rounding(gradients: list[Any]) -> float:
    """Estimates the rounding left in a gradient whose terms cancel: a few ulps of the largest gradient."""
    found = [g for g in gradients if g is not None and g.numel()]
    return max((16 * torch.finfo(g.dtype).eps * float(g.abs().max()) for g in found), default=0.0) or 1e-30


def _first_difference(
    compiled: BoundCall, whole: dict[str, Tensor], buffers: dict[str, Tensor], leaves: list[Any], state: Tensor, limit: float
) -> str | None:
    """Runs graph and simulated program operator by operator; names the first whose output differs."""
    graph, program = compiled.graph, compiled.program
    values: dict[str, Tensor] = {}
    for i in graph.inputs:
        table = {"parameter": whole, "buffer": _copies(buffers), "constant": graph.constants}.get(i.kind)
        values[i.value] = leaves[int(i.target)] if table is None else table[str(i.target)]
    inputs = [values[i.value].detach() for i in graph.inputs]
    probes = [v for n in graph.nodes for v in n.outputs if v in program.places]
    observed = _observe(program, inputs, [program.places[v] for v in probes], state)
    torch.set_rng_state(state)
    with torch.no_grad():
        for node in graph.nodes:
            here = [values[v] for v in node.inputs]
            args, kwargs = pytree.tree_map(
                lambda a, here=here: here[a.index] if isinstance(a, Slot) else a, (node.op.args, node.op.kwargs)
            )
            with nullcontext() if node.autocast is None else torch.autocast(*node.autocast):
                result = node.op.target(*args, **kwargs)
            results = list(result) if node.op.returns_sequence else [result]
            values.update(zip(node.outputs, results, strict=True))
            for value, meta in zip(node.outputs, node.op.outputs, strict=True):
                local = program.places.get(value)
                if local not in observed:
                    continue
                got = gather_rank_groups(observed[local], program.layouts[local], meta.shape, program.rank_groups[local])
                problem = difference(values[value], got, limit)
                if problem:
                    return f"{node.where}: {problem}"
    return None


def _observe(program: Any, inputs: list[Tensor], names: list[str], state: Tensor) -> dict[str, list[Tensor]]:
    """Runs the program once on simulated ranks. Returns every named local value, one tensor per rank group."""
    probed = replace(program, outputs=(), updates=())
    run = SimulatedWorld(program.world_size).bind(probed, keep=tuple(dict.fromkeys(names)))
    torch.set_rng_state(state)
    with torch.no_grad():
        return dict(zip(dict.fromkeys(names), run(*inputs), strict=True))
