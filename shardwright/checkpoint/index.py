"""Describes what a checkpoint holds: tensors with the slices that files have of them, and states.

The index is JSON and is written last, so that a folder with an index is whole. Reading checks all of it first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardwright.errors import CheckpointError, listed

NAME, FORMAT, VERSION = "index.json", "shardwright checkpoint", 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(safetensors|distcp)")


@dataclass(frozen=True)
class StoredSlice:
    """A slice of a tensor in a file.

    Args:
        file: name of the file, in the checkpoint's folder.
        key: name of the slice in the file.
        start, shape: the slice: where it starts along every dim, and its size.
        checksums: XXH3-64 of each MiB of its bytes, in hexadecimal digits.
    """

    file: str
    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its global shape, its dtype, and its slices, which do not overlap."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[StoredSlice, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Index:
    """The content of a checkpoint.

    Args:
        step: the step that it was saved at.
        tensors: by name.
        states: JSON of what is no tensor, by what it belongs to.
        aliases: other names of tensors that are tied.
        extra: what the user added.
        metric: the number by which the best ones are kept.
    """

    step: int
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    metric: float | None = None

    def to_json(self) -> str:
        """Returns the text of the file."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})


def read_index(folder: Path) -> Index:
    """Reads and checks the index of a checkpoint.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: there is none, or something in it is wrong; all that is wrong is listed.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    problems: list[str] = []
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no index of a checkpoint: its format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {content.get('version')!r}, and {VERSION} is read; use the release it is of"
        )
    kinds = {"step": int, "tensors": dict, "states": dict, "aliases": dict, "extra": dict}
    problems += [f"{key} is no {kind.__name__}" for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if not problems:
        tensors = {name: _tensor(name, value, problems) for name, value in content["tensors"].items()}
        aliases = content["aliases"]
        problems += [f"aliases: {a!r} names {b!r}, which is not there" for a, b in aliases.items() if b not in tensors]
    _raise(path, problems)
    known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Index(content["step"], known, content["states"], aliases, content["extra"], content.get("metric"))


def check_tensors(path: Path, tensors: Mapping[str, StoredTensor], in_folders: bool = False) -> None:
    """Checks what others say of tensors as what our index says.

    Args:
        path: what says it.
        tensors: by name.
        in_folders: whether files are in folders of ranks.

    Raises:
        CheckpointError: something cannot be; all of it is listed.
    """
    problems: list[str] = []
    for name, own in tensors.items():
        slices = [{**asdict(s), "start": list(s.start), "shape": list(s.shape)} for s in own.slices]
        for each in slices if in_folders else ():
            each["file"] = each["file"].split("/")[-1]
        _tensor(name, {"shape": list(own.shape), "dtype": own.dtype, "slices": slices}, problems)
    _raise(path, problems)


def _raise(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(listed(f"{path} is damaged or forged", problems[:20]), tuple(problems))


def _tensor(name: str, value: Any, problems: list[str]) -> StoredTensor | None:
    try:
        shape, dtype = _sizes(value["shape"]), value["dtype"]
        slices = tuple(read_slice(own) for own in value["slices"])
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{name}: {error}")
        return None
    if dtype not in DTYPES:
        problems.append(f"{name}: the dtype {dtype!r} is not known")
        return None
    elements = 0
    for own in slices:
        if len(own.start) != len(shape) or len(own.shape) != len(shape):
            problems.append(f"{name}: a slice of {len(own.shape)} dims of a tensor of {len(shape)}")
        elif any(start + size > whole for start, size, whole in zip(own.start, own.shape, shape, strict=True)):
            problems.append(f"{name}: the slice at {list(own.start)} of {list(own.shape)} is not within {list(shape)}")
        if not _FILE.fullmatch(own.file):
            problems.append(f"{name}: {own.file!r} is no name of a file in the folder")
        elements += math.prod(own.shape)
    if elements != math.prod(shape):
        problems.append(f"{name}: its slices have {elements} elements, the tensor {math.prod(shape)}")
    elif _overlap(slices):
        problems.append(f"{name}: its slices overlap")
    return StoredTensor(shape, dtype, slices)


def _overlap(slices: tuple[StoredSlice, ...]) -> bool:
    """Tells whether two slices have an element in common."""
    ordered = sorted((own for own in slices if math.prod(own.shape)), key=lambda own: own.start)
    for at, one in enumerate(ordered):
        for other in ordered[at + 1 :]:
            if one.start and other.start[0] >= one.start[0] + one.shape[0]:
                break
            ends = zip(one.start, one.shape, other.start, other.shape, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in ends):
                return True
    return False


def read_slice(value: Mapping[str, Any]) -> StoredSlice:
    """Reads a slice from JSON.

    Args:
        value: the JSON.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    checksums = tuple(str(digits) for digits in value["checksums"])
    return StoredSlice(str(value["file"]), str(value["key"]), _sizes(value["start"]), _sizes(value["shape"]), checksums)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in value):
        raise ValueError(f"{value!r} is no list of sizes")
    return tuple(value)
