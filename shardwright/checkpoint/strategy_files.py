"""Reads strategy files in MindSpore's JSON form, and checkpoints that have a folder of slices for each rank.

A strategy file says of every parameter by which device matrix it is sliced, and which axis, counted from the right, slices each
dim (-1: none). With optimizer parallel, the slices of dim 0 are sliced again among the ranks that would hold the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.checkpoint.files import header_of
from shardwright.checkpoint.index import Index, StoredSlice, StoredTensor, check_tensors
from shardwright.checkpoint.reading import Reader
from shardwright.checkpoint.rewrite import Part, Progress, check, write_parts
from shardwright.checkpoint.source import Source
from shardwright.checkpoint.tensors import Bounds, stored_slice, whole
from shardwright.errors import CheckpointError, listed

_RANK = re.compile(r"rank_(\d+)")


@dataclass(frozen=True)
class Slicing:
    """The slices of one parameter.

    Args:
        matrix: ranks along each axis of the device matrix; ranks are row-major.
        tensor_map: the axis that slices each dim, counted from the right, several for several; ``()``: none.
        pieces: pieces of dim 0 that ranks of the same slice share out; 1: all hold it whole.
        step: how far apart the ranks of such a group are; 0: as the replicas are.
    """

    matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    pieces: int = 1
    step: int = 0

    @property
    def ranks(self) -> int:
        return math.prod(self.matrix)

    def counts(self) -> tuple[int, ...]:
        """Returns into how many pieces each dim is sliced, without optimizer parallel."""
        return tuple(math.prod(self.matrix[-1 - axis] for axis in axes) for axes in self.tensor_map)

    def shared(self) -> int:
        """Returns into how many pieces dim 0 of a slice is sliced among its replicas."""
        replicas = self.ranks // math.prod(self.counts())
        return replicas if self.pieces < 0 else max(self.pieces, 1)

    def bounds(self, shape: Sequence[int]) -> list[Bounds | None]:
        """Returns what each rank holds of a parameter.

        Args:
            shape: global shape.

        Raises:
            CheckpointError: a dim cannot be sliced so.

        >>> Slicing((2, 2), ((1,), ())).bounds((4, 3))
        [((0, 2), (0, 3)), ((0, 2), (0, 3)), ((2, 4), (0, 3)), ((2, 4), (0, 3))]
        """
        counts, shared = self.counts(), self.shared()
        if len(shape) != len(counts):
            raise CheckpointError(f"a tensor map of {len(counts)} dims for a parameter of {len(shape)}")
        if any(n % c for n, c in zip(shape, counts, strict=True)) or (shape and shape[0] // counts[0] % shared):
            raise CheckpointError(
                f"{list(shape)} is not sliced evenly into {list(counts)} and {shared} pieces of the first dim"
            )
        found: list[Bounds | None] = []
        replicas: dict[Bounds, int] = {}
        for rank in range(self.ranks):
            place, rest = [0] * len(self.matrix), rank
            for axis in reversed(range(len(self.matrix))):
                rest, place[axis] = divmod(rest, self.matrix[axis])
            own = []
            for size, axes, count in zip(shape, self.tensor_map, counts, strict=True):
                number = 0
                for axis in axes:
                    number = number * self.matrix[-1 - axis] + place[-1 - axis]
                own.append((number * (size // count), (number + 1) * (size // count)))
            bounds = tuple(own)
            if shared > 1:
                replica = replicas.setdefault(bounds, 0)
                replicas[bounds] += 1
                piece = (rank // self.step) % shared if self.step else replica % shared
                first, rows = bounds[0][0], (bounds[0][1] - bounds[0][0]) // shared
                bounds = ((first + piece * rows, first + (piece + 1) * rows), *bounds[1:])
            found.append(bounds)
        return found


def read_strategy_file(path: Path) -> dict[str, Slicing]:
    """Reads a strategy file.

    Args:
        path: the file, in JSON.

    Raises:
        CheckpointError: it cannot be read, or says what cannot be; all problems are listed.
    """
    if path.suffix != ".json":
        raise CheckpointError(f"{path} is no JSON: save the strategy file under a name that ends in .json")
    try:
        items = json.loads(path.read_text("utf-8"))["parallel_layout_item"]
        layouts = dict(items)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no strategy file: {type(error).__name__}: {error}") from None
    found: dict[str, Slicing] = {}
    problems: list[str] = []
    for name, own in layouts.items():
        try:
            found[name] = _slicing(own)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problems.append(f"{name}: {error}")
    sizes = {own.ranks for own in found.values()}
    if len(sizes) > 1:
        problems.append(f"its device matrices have {', '.join(map(str, sorted(sizes)))} ranks: they must have as many")
    if problems:
        raise CheckpointError(listed(f"{path} cannot be used", problems), tuple(problems))
    return found


def _slicing(own: Mapping[str, Any]) -> Slicing:
    matrix = tuple(int(n) for n in own["dev_matrix"])
    maps = tuple(
        tuple(int(a) for a in (axes if isinstance(axes, list) else [axes]) if int(a) >= 0) for axes in own["tensor_map"]
    )
    used = [axis for axes in maps for axis in axes]
    if min(matrix, default=0) < 1 or max(used, default=-1) >= len(matrix) or len(set(used)) < len(used):
        raise ValueError(f"tensor_map {own['tensor_map']} does not fit dev_matrix {own['dev_matrix']}")
    if own.get("param_split_shape") or own.get("field"):
        raise ValueError("slices of sizes of their own (param_split_shape, field) are not read")
    found = Slicing(matrix, maps, int(own.get("opt_weight_shard_size") or 1), int(own.get("opt_weight_shard_step") or 0))
    replicas = found.ranks // math.prod(found.counts())
    if replicas % found.shared() or (found.shared() > 1 and not maps):
        raise ValueError(f"opt_weight_shard_size {found.pieces} does not divide its {replicas} replicas")
    return found


def open_rank_folders(folder: Path, strategy: Mapping[str, Slicing]) -> Source:
    """Opens a checkpoint with a folder ``rank_<n>`` for each rank, of whose safetensors files the last one by name counts.

    Args:
        folder: the folder of folders.
        strategy: how parameters are sliced; those that are not in it are whole, as rank 0 has them.

    Raises:
        CheckpointError: ranks are missing, or slices do not fit; all problems are listed.
    """
    ranks = next((own.ranks for own in strategy.values()), 1)
    files, problems = _files_of_ranks(folder, ranks)
    headers = [header_of(folder / file) for file in files] if not problems else []
    tensors: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(name for header in headers for name in header):
        slicing = strategy.get(name)
        first = next(header[name] for header in headers if name in header)
        if slicing is None:
            holder = next(rank for rank, header in enumerate(headers) if name in header)
            bounds: list[Bounds | None] = [None] * ranks
            bounds[holder] = whole(first.shape)
            shape = first.shape
        else:
            counts = list(slicing.counts())
            if counts:
                counts[0] *= slicing.shared()
            shape = tuple(n * c for n, c in zip(first.shape, counts, strict=False))
            try:
                bounds = slicing.bounds(shape) if len(counts) == len(first.shape) else []
            except CheckpointError as error:
                problems.append(f"{name}: {error}")
                continue
        slices: dict[Bounds, StoredSlice] = {}
        for rank, own in enumerate(bounds):
            if own is None or own in slices:
                continue
            size, there = tuple(b - a for a, b in own), headers[rank].get(name)
            if there is None or there.shape != size:
                says = "nothing" if there is None else str(list(there.shape))
                problems.append(f"{name}: rank {rank} has {says} of it, and by the strategy {list(size)}")
                continue
            slices[own] = stored_slice(files[rank], name, own)
        tensors[name] = StoredTensor(shape, first.dtype, tuple(slices.values()))
    if problems:
        raise CheckpointError(listed(f"{folder} does not fit its strategy", problems), tuple(problems))
    reader = Reader(folder)
    reader.has_checksums = False
    check_tensors(folder, tensors, in_folders=True)
    return Source("ranks", folder, Index(0, tensors), reader)


def _files_of_ranks(folder: Path, ranks: int) -> tuple[list[str], list[str]]:
    """Returns the file of each rank, and what is missing."""
    there = {int(m[1]): path for path in sorted(folder.glob("rank_*")) if (m := _RANK.fullmatch(path.name)) is not None}
    files, problems = [], []
    for rank in range(ranks):
        own = sorted(path.name for path in there[rank].glob("*.safetensors")) if rank in there else []
        if own:
            files.append(f"rank_{rank}/{own[-1]}")
        else:
            others = " (only .ckpt files, which are not read: save as safetensors)" if rank in there else ""
            problems.append(f"{folder / f'rank_{rank}'} has no safetensors file{others}")
    if not problems and len(there) > ranks:
        problems.append(
            f"there are folders of {len(there)} ranks, and the strategy has {ranks}; give the strategy of these ranks"
        )
    return files, problems


def write_rank_folders(
    source: Source, folder: Path, strategy: Mapping[str, Slicing], progress: Progress, prefix: str = "checkpoint"
) -> None:
    """Writes ``rank_<n>/<prefix><n>.safetensors`` for each rank of a strategy.

    Args:
        source: the checkpoint.
        folder: for the folders of ranks.
        strategy: how parameters are sliced; those that are not in it are whole on every rank.
        progress: told bytes, first as they are verified, then as they are written.
        prefix: of the files.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot be sliced so.
    """
    check(source, progress)
    ranks = next((own.ranks for own in strategy.values()), 1)
    bounds_of: dict[str, list[Bounds | None]] = {}
    problems: list[str] = []
    for name, tensor in source.index.tensors.items():
        slicing = strategy.get(name) or strategy.get(name.removeprefix("model."))
        try:
            bounds_of[name] = [whole(tensor.shape)] * ranks if slicing is None else slicing.bounds(tensor.shape)
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointError(listed(f"{source.path} cannot be sliced so", problems), tuple(problems))
    for rank in range(ranks):
        parts = [
            Part(name.removeprefix("model."), name, source.index.tensors[name].dtype, bounds)
            for name, everywhere in bounds_of.items()
            if (bounds := everywhere[rank]) is not None
        ]
        place = folder / f"rank_{rank}"
        place.mkdir(parents=True, exist_ok=True)
        write_parts(place / f"{prefix}{rank}.safetensors", parts, source, progress)
