"""Describes a call of a net in words that the ranks of a job compare.

The words must be the same on every rank: no ids, no addresses, no index of a device.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.agreement.checksum import checksum, sketch

_LISTED = 40  # modules or parameters that a signature names one by one
_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype)


@dataclass(frozen=True)
class Signature:
    """Description of a call: ``facts`` by their subject, and a number that differs where they do."""

    facts: Mapping[str, str]
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", number_of([json.dumps(self.facts)]))

    def with_gradients(self, enabled: bool) -> Signature:
        """Returns the signature of the same call with gradients on or off."""
        return Signature({**self.facts, GRADIENTS: _gradients(enabled)})


GRADIENTS = "gradient mode"
# What is true of everything that a signature does not name.
_UNSAID = {"module": "as the whole model", "parameter": "trained", "input": "not there", "autocast": "off"}


def number_of(lines: Iterable[str]) -> int:
    """Computes a number of 56 bits that differs, in all likelihood, where the lines do."""
    return int.from_bytes(hashlib.blake2b("\n".join(lines).encode("utf-8", "replace"), digest_size=7).digest(), "little")


def signature_of(
    root: nn.Module, leaves: Sequence[Any], spec: Any, name: str, shapes: Sequence[Sequence[int]] | None = None
) -> Signature:
    """Describes a call of a net.

    Args:
        root: the module that owns the parameters.
        leaves: the flat inputs.
        spec: how they are arranged.
        name: the net, by its number and kind.
        shapes: the global shapes of the tensors among the inputs, where this rank gives slices.
    """
    facts = {"net": name}
    if not isinstance(spec, int):
        facts["arrangement of arguments"] = str(spec)
    known = iter(shapes or [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)])
    facts |= {f"input {i}": _described(leaf, known) for i, leaf in enumerate(leaves)}
    facts[GRADIENTS] = _gradients(torch.is_grad_enabled())
    modules, parameters = dict(root.named_modules()), dict(root.named_parameters())
    facts["mode of the model"] = _mode(root)
    other = {f"module {n}": _mode(m) for n, m in modules.items() if m.training != root.training}
    frozen = {f"parameter {n}": "frozen" for n, p in parameters.items() if not p.requires_grad}
    for what, found in (("modules in another mode than the model", other), ("frozen parameters", frozen)):
        facts |= found if len(found) <= _LISTED else {what: f"{len(found)}, number {number_of(found):x}"}
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            facts[f"autocast on {device}"] = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    return Signature(facts)


def _gradients(enabled: bool) -> str:
    return "on" if enabled else "off (torch.no_grad)"


def _mode(module: nn.Module) -> str:
    return "train()" if module.training else "eval()"


def _described(leaf: Any, shapes: Iterator[Sequence[int]]) -> str:
    if isinstance(leaf, Tensor):
        kind = "" if leaf.device.type == "cpu" else f" on {leaf.device.type}"
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype} {list(next(shapes))}{kind}{', requires_grad' if leaf.requires_grad else ''}"
    return repr(leaf)[:80] if isinstance(leaf, _PLAIN) else f"a {type(leaf).__name__}"


def difference_of(here: Mapping[str, str], rank: int, there: Mapping[str, str], other: int) -> str:
    """Describes in words the first three facts that differ between two ranks; empty where none does.

    Args:
        here, there: the facts of the two ranks.
        rank, other: their numbers.
    """
    found = []
    for what in dict.fromkeys((*there, *here)):
        mine, its = (facts.get(what) or _UNSAID.get(what.split()[0], "not there") for facts in (here, there))
        if mine != its:
            found.append(f"rank {other}'s {what} is {its}, rank {rank}'s {mine}")
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def lines_of(text: str, root: nn.Module | None = None) -> list[str]:
    """Returns a text's lines without what differs between ranks. The parameters of a module come first, one per line."""
    parameters = [] if root is None else root.named_parameters()
    first = [f"parameter {n} {list(p.shape)} {p.dtype}{'' if p.requires_grad else ', frozen'}" for n, p in parameters]
    return [*first, *_OWN.sub("", text).splitlines()]


_OWN = re.compile(r" at 0x[0-9a-f]+|(?<=cuda):\d+")  # addresses, and the number of a rank's device


# -- the values of inputs ---------------------------------------------------------------------------------------------


def value_summaries(tensors: Iterable[Any], sketched: bool = False) -> list[Any]:
    """Summarizes the values of tensors by checksums; ``sketched`` adds what :func:`differing_value` needs."""
    return [_value_summary(tensor, sketched) for tensor in tensors]


def _value_summary(tensor: Any, sketched: bool) -> Any:
    is_plain = isinstance(tensor, Tensor) and type(tensor) in (Tensor, nn.Parameter)
    if not is_plain or tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    value = tensor.detach().resolve_conj().resolve_neg()
    if not sketched:
        return checksum(value)
    is_inexact = value.is_floating_point() or value.is_complex()
    return [checksum(value), sketch(value) if is_inexact else None, _roundoff(value.dtype)]


def _roundoff(dtype: torch.dtype) -> float:
    """Returns the relative distance of tensors that were computed alike, but added in another order."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def differing_value(here: Sequence[Any], there: Sequence[Any], allowed: float = 0.0) -> int | None:
    """Returns the position of the first tensor whose values differ by more than rounding.

    Args:
        here, there: the sketched summaries of two ranks.
        allowed: a larger difference that is allowed, as a share of the tensor's norm.
    """
    for at, (mine, its) in enumerate(zip(here, there, strict=False)):
        if mine is None or its is None or mine[0] == its[0]:
            continue
        if mine[1] is None or its[1] is None:
            return at
        size = max(mine[1][0], its[1][0])
        if max(abs(a - b) for a, b in zip(mine[1], its[1], strict=True)) > max(mine[2], allowed) * size:
            return at
    return None
