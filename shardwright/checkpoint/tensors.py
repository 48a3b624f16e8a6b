"""Says what of a tensor this rank holds, and which rank writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwright.checkpoint.index import StoredSlice
from shardwright.checkpoint.ranks import rank_and_size
from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.parameters.handles import current
from shardwright.parameters.placements import layout_of

Bounds = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Bounds:
    """Returns the bounds of a whole tensor.

    >>> whole((4, 2))
    ((0, 4), (0, 2))
    """
    return tuple((0, size) for size in shape)


def key_of(name: str, bounds: Bounds) -> str:
    """Returns the key of a slice in files.

    >>> key_of("model.weight", ((4, 8), (0, 2)))
    'model.weight@4x0'
    """
    return f"{name}@{'x'.join(str(a) for a, _ in bounds)}"


def stored_slice(file: str, key: str, bounds: Bounds, checksums: Sequence[str] = ()) -> StoredSlice:
    """Describes a slice that is in a file.

    Args:
        file, key: where it is.
        bounds: first and last index along every dim.
        checksums: of its bytes.
    """
    return StoredSlice(file, key, tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds), tuple(checksums))


class Held(NamedTuple):
    """The part of a tensor that this rank holds: nothing where the bounds are missing."""

    shape: tuple[int, ...]
    dtype: str
    bounds: Bounds | None


def held(tensor: Tensor, name: str, problems: list[str]) -> Held:
    """Returns what this rank holds of a tensor.

    Args:
        tensor: the tensor.
        name: its name, for messages.
        problems: gets what cannot be saved or loaded.
    """
    tensor = current(tensor)
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if is_delayed(tensor) or tensor.is_meta:
        problems.append(f"{name} has no values yet; call net.compile(*inputs) before")
        return Held(shape, dtype, None)
    layout = layout_of(tensor)
    if layout is None:
        if isinstance(tensor, DTensor):
            problems.append(f"{name} is distributed as {tensor.placements}, which is no layout; give its full_tensor()")
        return Held(shape, dtype, whole(shape))
    bounds = layout.bounds(shape).get(rank_and_size()[0])
    return Held(shape, dtype, None if bounds is None else tuple((int(a), int(b)) for a, b in bounds))


def local(tensor: Tensor) -> Tensor:
    """Returns the tensor of what this rank holds, without gradient."""
    tensor = current(tensor)
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def writers(everywhere: Sequence[Mapping[str, Held]]) -> dict[str, dict[Bounds, int]]:
    """Chooses a rank for each slice of each tensor: of those that hold it the one that writes least so far.

    Args:
        everywhere: what each rank holds.

    Returns:
        By name, the rank that writes each slice.
    """
    bytes_of = [0] * len(everywhere)
    found: dict[str, dict[Bounds, int]] = {}
    for name in dict.fromkeys(name for own in everywhere for name in own):
        holders: dict[Bounds, list[int]] = {}
        for rank, own in enumerate(everywhere):
            if name in own and own[name].bounds is not None:
                holders.setdefault(own[name].bounds, []).append(rank)  # type: ignore[arg-type]
        found[name] = {}
        for bounds, ranks in holders.items():
            size = math.prod(b - a for a, b in bounds)
            if size or not holders or all(math.prod(b - a for a, b in own) == 0 for own in holders):
                rank = min(ranks, key=lambda r: (bytes_of[r], r))
                bytes_of[rank] += size
                found[name][bounds] = rank
    return found


def parts_of(value: Any, name: str, kind: type) -> dict[str, Any]:
    """Returns the models or optimizers of an argument by the names they have in a checkpoint.

    Args:
        value: one, a mapping of them by name, or ``None``.
        name: of the argument.
        kind: ``nn.Module`` or ``Optimizer``.

    Raises:
        TypeError: it is none of these.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping) and not isinstance(value, kind):
        bad = [key for key in value if not isinstance(key, str) or not key or "." in key]
        if bad:
            raise TypeError(f"{name} has the name {bad[0]!r}; give each a text without dots")
        found = {f"{name}.{key}": own for key, own in value.items()}
    else:
        found = {name: value}
    for key, own in found.items():
        if not isinstance(own, kind):
            raise TypeError(f"{key} is a {type(own).__name__}; give {kind.__name__}s")
    return {key: _network_of(own) for key, own in found.items()}


def _network_of(model: Any) -> Any:
    """Returns the network within cells that only say how it runs; its names do not depend on how that is."""
    own = model.module if hasattr(model, "settings") and isinstance(getattr(model, "module", None), nn.Module) else model
    if not getattr(type(own), "wraps_network", False):
        return model
    while getattr(type(own), "wraps_network", False):
        own = own.network
    return own


def named_tensors(models: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Returns the tensors of models by name, other names of tied ones, and what is no tensor.

    Args:
        models: by name.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    others: dict[str, Any] = {}
    first: dict[int, str] = {}
    for prefix, model in models.items():
        for key, value in model.state_dict(keep_vars=True).items():
            name = f"{prefix}.{key}"
            if not isinstance(value, Tensor):
                others[name] = value
            elif id(current(value)) in first:
                aliases[name] = first[id(current(value))]
            else:
                first[id(current(value))] = name
                tensors[name] = value
    return tensors, aliases, others


def names_of_parameters(optimizer: Optimizer, models: Mapping[str, nn.Module]) -> list[list[str]]:
    """Returns the names of the parameters of each group of an optimizer; their places where no model has them.

    Args:
        optimizer: the optimizer.
        models: by name.
    """
    known = {
        id(current(parameter)): f"{prefix}.{name}"
        for prefix, model in reversed(list(models.items()))
        for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))
    }
    return [
        [known.get(id(current(p)), f"{g}.{n}") for n, p in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def on_cpu(tensor: Tensor) -> Tensor:
    """Returns a tensor as files have it: on the CPU, contiguous, without ties to others."""
    found = local(tensor).to("cpu").contiguous()
    return found if found.numel() == found.untyped_storage().nbytes() // max(found.element_size(), 1) else found.clone()
