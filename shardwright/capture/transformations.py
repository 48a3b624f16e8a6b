"""Transformations of ``torch.func`` within a captured callable: ``vmap``, ``grad``, ``vjp``, ``jvp``, and what is made of them.

The outermost one is written out as operators, with those within it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from shardwright.base.operators import DERIVED_TWICE_AT_MOST, FACTORISES
from shardwright.base.torch_private import functorch_apis, functorch_transforms, pytree
from shardwright.capture.refusals import refuse
from shardwright.capture.torch_functions import Watch
from shardwright.capture.written_out import written_out


def transformations(watch: Watch) -> list[tuple[Any, str, Any]]:
    """Lists owner, name and replacement of each function of torch that runs a transformation."""

    def replaced(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return _call(watch, plain, args, kwargs)

        return run

    plain_dual_level = forward_ad.enter_dual_level
    plain_vjp = functorch_transforms._vjp_with_argnums

    def vjp(function: Callable[..., Any], *primals: Any, **options: Any) -> Any:
        """Replaces ``vjp``, whose result holds a function that is called later."""
        if not watch.is_in_callable:
            return plain_vjp(function, *primals, **options)
        first = _call(watch, lambda *given: _without_function(plain_vjp(function, *given, **options)), primals, {})

        def pull(cotangents: Any, **kwargs: Any) -> Any:
            return _call(watch, lambda cotangents, *given: plain_vjp(function, *given, **options)[1](cotangents, **kwargs),
                         (cotangents, *primals), {})  # fmt: skip

        return (first[0], pull, *first[1:])

    plain_jvp = functorch_transforms._jvp_with_argnums

    def jvp(function: Any, primals: Any, tangents: Any, argnums: Any, **options: Any) -> Any:
        """Replaces ``jvp``: torch cannot run forward-mode derivatives on tensors without values.

        Args:
            function, primals, tangents, argnums, options: as torch's.
        """
        if not (watch.is_in_callable or watch.is_transforming):
            return plain_jvp(function, primals, tangents, argnums, **options)

        def push(primals: Any, tangents: Any) -> Any:
            watch.has_pushed = True
            return _jvp_by_vjp(plain_vjp, function, primals, tangents, argnums, options["has_aux"])

        return _call(watch, push, (primals, tangents), {})

    def dual_level() -> Any:
        if watch.is_in_callable:
            raise refuse("forward_ad.dual_level cannot be captured: duals are no operators", "Call torch.func.jvp")
        return plain_dual_level()

    return [
        (forward_ad, "enter_dual_level", dual_level),
        (functorch_apis, "vmap_impl", replaced(functorch_apis.vmap_impl)),
        (functorch_transforms, "grad_impl", replaced(functorch_transforms.grad_impl)),
        (functorch_transforms, "grad_and_value_impl", replaced(functorch_transforms.grad_and_value_impl)),
        (functorch_transforms, "_jvp_with_argnums", jvp),
        (functorch_transforms, "_vjp_with_argnums", vjp),
    ]


def _jvp_by_vjp(
    vjp: Callable[..., Any], function: Callable[..., Any], primals: Any, tangents: Any, argnums: Any, has_aux: bool
) -> Any:
    """Computes a function and its derivative in a direction, as the derivative of the pull-back, which is linear.

    Args:
        vjp: torch's.
        function: what is derived.
        primals: its arguments.
        tangents: the direction, per argument that is derived by.
        argnums: numbers of those arguments; ``None`` for all.
        has_aux: whether the function returns a pair, of which only the first is derived.
    """
    numbers = range(len(primals)) if argnums is None else (argnums,) if isinstance(argnums, int) else argnums
    numbers = [number % len(primals) for number in numbers]

    def of_some(*some: Any) -> Any:
        given = list(primals)
        for number, value in zip(numbers, some, strict=True):
            given[number] = value
        return function(*given)

    result, pull, *aux = vjp(of_some, *[primals[number] for number in numbers], has_aux=has_aux)
    zeros = pytree.tree_map(torch.zeros_like, result)
    of_pull = vjp(pull, zeros)[1]
    direction = tangents if isinstance(tangents, tuple) else (tangents,)
    return (result, of_pull(direction)[0], *aux)


def _without_function(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return (found[0], *found[2:])


def _call(watch: Watch, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a transformation, written out as operators if it is the outermost of the callable."""
    if not watch.is_in_callable:
        return plain(*args, **kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*given: Tensor) -> Any:
        values = iter(given)
        whole = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        new_args, new_kwargs = pytree.tree_unflatten(whole, spec)
        return plain(*new_args, **new_kwargs)

    def edit(graph: fx.Graph) -> None:
        """Refuses what autograd would differentiate wrongly once more."""
        if not (watch.has_pushed and torch.is_grad_enabled()):
            return
        for node in graph.nodes:
            packet = getattr(node.target, "overloadpacket", None)
            if packet not in DERIVED_TWICE_AT_MOST | FACTORISES:
                continue
            raise refuse(
                f"jvp, jacfwd or hessian of {packet} cannot be captured: torch runs forward-mode derivatives only on tensors "
                "with values, and its reverse mode derives this operator twice at most",
                "Use jacrev(jacrev(f)) for a hessian; or call it under torch.no_grad",
            )

    with watch.paused(), watch.transforming():
        watch.has_pushed = False
        return written_out(run, tensors, watch.at_user_line, edit)
