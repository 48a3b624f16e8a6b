"""Writes safetensors files, and reads verified parts of them without anything that runs code."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from shardwright.checkpoint.index import DTYPES, StoredSlice
from shardwright.errors import CheckpointError

CHUNK = 1 << 20  # bytes that a checksum is of
_LONGEST_HEADER = 1 << 28
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


class Place(NamedTuple):
    """The place of a tensor in a file: its first byte, its bytes, its dtype and its shape."""

    first: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a file, and waits until the disk has it.

    Args:
        path: the file.
        tensors: by key; contiguous, on the CPU.
    """
    save_file(dict(tensors), path)
    sync(path)


def sync(path: Path) -> None:
    """Waits until the disk has a file or what a folder lists."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksums(tensor: Tensor) -> tuple[int, ...]:
    """Computes the checksum of each MiB of a contiguous tensor's bytes."""
    if not tensor.numel():
        return ()
    view: Any = tensor.reshape(-1).view(torch.uint8).numpy().data
    return tuple(zlib.crc32(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK))


@lru_cache(maxsize=1024)
def read_header(path: Path, size: int, changed: int) -> dict[str, Place]:
    """Reads where the tensors of a file stand.

    Args:
        path: the file.
        size, changed: its bytes and when it was changed, by which what was read before is told from it.

    Raises:
        CheckpointError: it is no safetensors file, or its header says what cannot be.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{path} is damaged: its header would have {length} bytes of {size}")
        text = file.read(length)
    try:
        content = json.loads(text)
        own = {name: value for name, value in content.items() if name != "__metadata__"}
        found = {name: _place(value, 8 + length, size) for name, value in own.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its header cannot be read: {error}") from None
    ends = 8 + length
    for place in sorted(found.values()):
        if place.first < ends:
            raise CheckpointError(f"{path} is damaged: its tensors overlap")
        ends = place.first + place.bytes
    return found


def _place(value: Mapping[str, Any], data: int, size: int) -> Place:
    first, last = value["data_offsets"]
    shape = tuple(int(n) for n in value["shape"])
    names = {short: name for name, short in _NAMES.items()}
    dtype = names[value["dtype"]]
    if not 0 <= first <= last <= size - data or min(shape, default=0) < 0:
        raise ValueError(f"offsets {first} to {last} of {size - data} bytes")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{last - first} bytes for {list(shape)} of {dtype}")
    return Place(data + first, last - first, dtype, shape)


class Reader:
    """Reads parts of the slices of a checkpoint, and counts what it reads.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder, self.bytes_read = folder, 0

    def place(self, stored: StoredSlice, dtype: str) -> Place:
        """Returns where a slice stands, if its file says of it what the index does.

        Args:
            stored: the slice.
            dtype: of the tensor.

        Raises:
            CheckpointError: the file is missing, damaged, or says something else.
        """
        path = self.folder / stored.file
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing; restore it, or load an earlier step")
        status = path.stat()
        place = read_header(path, status.st_size, status.st_mtime_ns).get(stored.key)
        if place is None or (place.dtype, place.shape) != (dtype, stored.shape):
            there = "nothing" if place is None else f"{list(place.shape)} of {place.dtype}"
            raise CheckpointError(f"{path} has {there} at {stored.key}, the index {list(stored.shape)} of {dtype}")
        if len(stored.checksums) != -(-place.bytes // CHUNK):
            raise CheckpointError(f"{path}: {stored.key} has {len(stored.checksums)} checksums for {place.bytes} bytes")
        return place

    def rows(self, stored: StoredSlice, dtype: str, first: int, last: int) -> Tensor:
        """Reads rows of a slice, and verifies all that is read.

        Args:
            stored: the slice.
            dtype: of the tensor.
            first, last: the rows, along its dim 0; of a number 0 and 1.

        Raises:
            CheckpointError: what is read has another checksum.
        """
        place = self.place(stored, dtype)
        count = stored.shape[0] if stored.shape else 1
        row = place.bytes // count if count else 0
        begin = first * row // CHUNK * CHUNK
        end = min(-(-last * row // CHUNK) * CHUNK, place.bytes)
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        view: Any = buffer.numpy().data
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(place.first + begin)
            at = 0
            while at < len(view) and (read := file.readinto(view[at:])):
                at += read
        self.bytes_read += at
        for number, offset in enumerate(range(0, len(view), CHUNK), begin // CHUNK):
            if at < len(view) or zlib.crc32(view[offset : offset + CHUNK]) != stored.checksums[number]:
                raise CheckpointError(
                    f"{self.folder / stored.file} is damaged: {stored.key} has other bytes than were written; restore the "
                    "file, or load an earlier step"
                )
        part = buffer[first * row - begin : last * row - begin]
        if part.storage_offset() % max(DTYPES[dtype].itemsize, 1):
            part = part.clone()
        shape = (last - first, *stored.shape[1:]) if stored.shape else ()
        return part.view(DTYPES[dtype]).view(shape)


def part_of(reader: Reader, stored: Sequence[StoredSlice], dtype: str, bounds: Sequence[tuple[int, int]], into: Tensor) -> None:
    """Reads a part of a tensor from the slices that hold it.

    Args:
        reader: of the checkpoint.
        stored: the tensor's slices.
        dtype: of the tensor.
        bounds: first and last index of the part along every dim.
        into: gets the part; of its shape.
    """
    for own in stored:
        ends = [(max(a, start), min(b, start + size)) for (a, b), start, size in zip(bounds, own.start, own.shape, strict=True)]
        if any(a >= b for a, b in ends):
            continue
        first, last = (ends[0][0] - own.start[0], ends[0][1] - own.start[0]) if ends else (0, 1)
        rows = reader.rows(own, dtype, first, last)
        inner = tuple(slice(a - start, b - start) for (a, b), start in list(zip(ends, own.start, strict=True))[1:])
        there = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(ends, bounds, strict=True))
        every = (slice(None), *inner)
        into[there].copy_(rows[every] if ends else rows)
