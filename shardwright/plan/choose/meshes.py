"""Factorisations of a device count that are worth planning on."""

from __future__ import annotations

import math
from functools import cache

from shardwright.ir.machine import Machine

# A mesh of more axes has too many choices per operator to look at all of them.
_MOST_AXES = 3


@cache
def prime_factors(n: int) -> tuple[int, ...]:
    """Computes the prime factors of ``n``, ascending.

    >>> prime_factors(12), prime_factors(1)
    ((2, 2, 3), ())
    """
    found, divisor = [], 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor += 1
    return tuple([*found, n] if n > 1 else found)


@cache
def factorisations(n: int, axes: int) -> tuple[tuple[int, ...], ...]:
    """Lists every way to write ``n`` as an ordered product of ``axes`` factors above 1.

    >>> factorisations(8, 2)
    ((2, 4), (4, 2))
    """
    if axes == 1:
        return ((n,),) if n > 1 else ()
    return tuple((d, *rest) for d in range(2, n // 2 + 1) if n % d == 0 for rest in factorisations(n // d, axes - 1))


def meshes_to_try(n: int, machine: Machine, most: int) -> list[tuple[int, ...]]:
    """Lists up to ``most`` meshes of ``n`` devices, the most promising first.

    An axis may stand for any product of neighbours, so that of meshes that refine each other only the finest is tried:
    8 devices as 2·2·2 can do all that 8, 2·4 and 4·2 can. Beyond three axes, an axis should end where a node does.
    """
    if n == 1:
        return [(1,)]
    primes = prime_factors(n)
    if len(primes) <= _MOST_AXES:
        found = {tuple(reversed(primes))} | {f for f in factorisations(n, len(primes))}
        return sorted(found, key=lambda f: _distance(f, n, machine))[:most]
    candidates = {f for axes in (2, _MOST_AXES) for f in _some_factorisations(n, axes, machine)}
    return sorted(candidates, key=lambda f: _distance(f, n, machine))[:most]


def _some_factorisations(n: int, axes: int, machine: Machine) -> list[tuple[int, ...]]:
    node = _node_size(n, machine)
    outer = n // node
    found = []
    for inner_axes in range(0, axes + 1):
        inner = factorisations(node, inner_axes) if inner_axes and node > 1 else ((),) if node == 1 else ()
        rest = factorisations(outer, axes - inner_axes) if axes - inner_axes and outer > 1 else ((),) if outer == 1 else ()
        found += [(*a, *b) for a in rest for b in inner if len(a) + len(b) == axes]
    return found


def _node_size(n: int, machine: Machine) -> int:
    """Returns how many devices of a node a mesh of ``n`` devices can have on one axis."""
    size = machine.levels[0].size or n if machine.levels else n
    return math.gcd(n, size) if math.gcd(n, size) > 1 else 1


def _distance(sizes: tuple[int, ...], n: int, machine: Machine) -> tuple[float, ...]:
    """Computes how far a mesh is from the usual best: a whole node on the last axes, the outer ones balanced."""
    node = _node_size(n, machine)
    inner, at = 1, len(sizes)
    while at > 0 and inner < node:
        at -= 1
        inner *= sizes[at]
    aligned = 0.0 if inner == node else 1.0
    spread = max(sizes) / min(sizes)
    # ranks of one node on one axis, and two axes outside, suit tensor, sequence and data parallelism
    return aligned, abs(len(sizes) - _MOST_AXES), spread
