"""Rewrites a checkpoint in other slices, a block of rows at a time, so that it may be larger than memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from shardwright.checkpoint.files import CHUNK, DTYPE_NAMES, sync
from shardwright.checkpoint.folder import prepare, publish, unfinished
from shardwright.checkpoint.index import DTYPES, NAME, StoredSlice, StoredTensor
from shardwright.checkpoint.reading import Share
from shardwright.checkpoint.source import Source
from shardwright.checkpoint.tensors import Bounds, Held, key_of, stored_slice, whole, writers
from shardwright.errors import CheckpointError, listed

_BLOCK = 64 * 2**20  # bytes that are in memory at a time, unless a single row has more
# What each rank has of a tensor of a name and shape.
Cut = Callable[[str, tuple[int, ...]], Sequence[Bounds | None]]
Progress = Callable[[int], None]


@dataclass
class Part:
    """A part of a tensor for a file: its key there, the tensor's name and dtype, and where it is."""

    key: str
    name: str
    dtype: str
    bounds: Bounds
    checksums: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in self.bounds)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def verify_source(source: Source, progress: Progress, names: Sequence[str] | None = None) -> list[str]:
    """Verifies the bytes of tensors; returns what is wrong.

    Args:
        source: the checkpoint.
        progress: told bytes as they are verified.
        names: which tensors; ``None``: all.
    """
    problems: list[str] = []
    for name in names if names is not None else source.index.tensors:
        tensor = source.index.tensors[name]
        for stored in tensor.slices:
            size = math.prod(stored.shape) * DTYPES[tensor.dtype].itemsize
            try:
                source.reader.check(stored, tensor.dtype)
                if source.reader.has_checksums:
                    source.reader.verify(Share(stored, tensor.dtype, 0, len(stored.checksums)))
            except CheckpointError as error:
                problems.append(f"{name}: {error}")
            progress(size)
    return problems


def write_parts(path: Path, parts: Sequence[Part], source: Source, progress: Progress, dtype: str | None = None) -> None:
    """Writes parts of a checkpoint's tensors to a safetensors file, and what their checksums are to the parts.

    Args:
        path: the file.
        parts: what is to be in it.
        source: the checkpoint, which :func:`check` has verified.
        progress: told bytes as they are written.
        dtype: that floating tensors are converted to.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    header, at = {}, 0
    for part in parts:
        if dtype is not None and DTYPES[part.dtype].is_floating_point:
            part.dtype = dtype
        header[part.key] = {
            "dtype": DTYPE_NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [at, at + part.bytes],
        }  # fmt: skip
        at += part.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            rest, sums = bytearray(), []
            for block in _blocks(source, part):
                data: memoryview = block.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                progress(len(data))
                rest += data
                full = len(rest) // CHUNK * CHUNK
                with memoryview(rest) as view:
                    sums += [xxh3_64_hexdigest(view[i : i + CHUNK]) for i in range(0, full, CHUNK)]
                del rest[:full]
            part.checksums = (*sums, *([xxh3_64_hexdigest(rest)] if rest else []))
    sync(path)


def _blocks(source: Source, part: Part) -> Iterator[Tensor]:
    """Yields a part in blocks of rows."""
    stored = source.index.tensors[part.name]
    if not math.prod(part.shape):
        return
    if not part.shape:
        ends: list[Bounds] = [()]
    else:
        (low, high), inner = part.bounds[0], part.bounds[1:]
        row = max(math.prod(part.shape[1:]) * DTYPES[stored.dtype].itemsize, 1)
        step = max(_BLOCK // row, 1)
        ends = [((a, min(a + step, high)), *inner) for a in range(low, high, step)]
    for bounds in ends:
        into = torch.empty([b - a for a, b in bounds], dtype=DTYPES[stored.dtype])
        source.reader.read(stored.slices, stored.dtype, bounds, into)
        yield into.to(DTYPES[part.dtype])


def rewrite(source: Source, folder: Path, cut: Cut, progress: Progress) -> Path:
    """Writes a checkpoint anew, each slice once, in files of the ranks that would have written them.

    Args:
        source: the checkpoint.
        folder: for the new one; a step of the same number in it is replaced.
        cut: says what each rank has of a tensor.
        progress: told bytes, first as they are verified, then as they are written.

    Returns:
        The folder of the step.

    Raises:
        CheckpointError: the checkpoint is damaged; nothing was written.
    """
    check(source, progress)
    index = source.index
    bounds_of = {name: tuple(cut(name, tensor.shape)) for name, tensor in index.tensors.items()}
    ranks = max((len(own) for own in bounds_of.values()), default=1)
    everywhere: list[dict[str, Held]] = [{} for _ in range(ranks)]
    for name, own in bounds_of.items():
        for rank, bounds in enumerate(own):
            everywhere[rank][name] = Held(index.tensors[name].shape, index.tensors[name].dtype, bounds)
    files: dict[int, list[Part]] = {}
    for name, slices in writers(everywhere).items():
        for bounds, rank in slices.items():
            files.setdefault(rank, []).append(Part(key_of(name, bounds), name, index.tensors[name].dtype, bounds))
    prepare(folder, index.step)
    place = unfinished(folder, index.step)
    found: dict[str, list[StoredSlice]] = {name: [] for name in index.tensors}
    for rank, parts in sorted(files.items()):
        name = f"rank-{rank}.safetensors"
        write_parts(place / name, parts, source, progress)
        for part in parts:
            found[part.name].append(stored_slice(name, part.key, part.bounds, part.checksums))
    tensors = {name: StoredTensor(own.shape, own.dtype, tuple(found[name])) for name, own in index.tensors.items()}
    (place / NAME).write_text(replace(index, tensors=tensors).to_json(), "utf-8")
    sync(place / NAME)
    return publish(folder, index.step)


def check(source: Source, progress: Progress, names: Sequence[str] | None = None) -> None:
    """Raises an error if something is wrong with tensors of a checkpoint.

    Args:
        source: the checkpoint.
        progress: told bytes as they are verified.
        names: which tensors; ``None``: all.

    Raises:
        CheckpointError: all that is wrong.
    """
    problems = verify_source(source, progress, names)
    if problems:
        raise CheckpointError(listed(f"{source.path} is damaged", problems), tuple(problems))


def cut_evenly(ranks: int) -> Cut:
    """Cuts every tensor along its dim 0 into as many pieces as there are ranks; one with fewer rows stays whole.

    Args:
        ranks: how many.

    >>> cut_evenly(2)("weight", (3, 2))
    [((0, 2), (0, 2)), ((2, 3), (0, 2))]
    """

    def cut(name: str, shape: tuple[int, ...]) -> list[Bounds | None]:
        if not shape or shape[0] < ranks:
            return [whole(shape)] * ranks
        size, more = divmod(shape[0], ranks)
        starts = [rank * size + min(rank, more) for rank in range(ranks + 1)]
        return [((a, b), *whole(shape[1:])) for a, b in pairwise(starts)]

    return cut


def cut_as(layouts: Mapping[str, Callable[[tuple[int, ...]], Sequence[Bounds | None]]], ranks: int) -> Cut:
    """Cuts parameters as they are named, and their optimizer's states with them; all else is whole.

    Args:
        layouts: says what each rank has of a parameter of a shape, by its name without ``model.``.
        ranks: how many.
    """

    def cut(name: str, shape: tuple[int, ...]) -> Sequence[Bounds | None]:
        _, _, own = name.rpartition("model.")
        for key in (own, own.rpartition(".")[0]):
            if key in layouts and shape:
                found = layouts[key](shape)
                if found:
                    return found
        return [whole(shape)] * ranks

    return cut
