"""Writes safetensors files, and reads their headers, without anything that runs code."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from shardwright.checkpoint.index import DTYPES
from shardwright.errors import CheckpointError

CHUNK = 1 << 20  # bytes that a checksum is of
_LONGEST_HEADER = 1 << 28
DTYPE_NAMES = {
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


def checksums(tensor: Tensor) -> tuple[str, ...]:
    """Computes the checksum, XXH3-64, of each MiB of a contiguous tensor's bytes."""
    if not tensor.numel():
        return ()
    view: Any = tensor.reshape(-1).view(torch.uint8).numpy().data
    return tuple(xxh3_64_hexdigest(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK))


def header_of(path: Path) -> dict[str, Place]:
    """Reads where the tensors of a file stand, once for as long as the file is as it is.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing, no safetensors file, or its header says what cannot be.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; restore it")
    status = path.stat()
    return read_header(path, status.st_size, status.st_mtime_ns)


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
    names = {short: name for name, short in DTYPE_NAMES.items()}
    dtype = names[value["dtype"]]
    if not 0 <= first <= last <= size - data or min(shape, default=0) < 0:
        raise ValueError(f"offsets {first} to {last} of {size - data} bytes")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{last - first} bytes for {list(shape)} of {dtype}")
    return Place(data + first, last - first, dtype, shape)
