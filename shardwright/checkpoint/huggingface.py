"""Reads folders of Hugging Face weights: safetensors files of whole tensors, and an index if there are several."""

from __future__ import annotations

import json
from pathlib import Path

from shardwright.checkpoint.files import header_of
from shardwright.checkpoint.index import Index, StoredSlice, StoredTensor
from shardwright.errors import CheckpointError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def is_huggingface(folder: Path) -> bool:
    """Tells whether a folder has Hugging Face weights."""
    return (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file()


def huggingface_index(folder: Path) -> Index:
    """Describes the tensors of a folder by their names in it; only the headers of files are read.

    Args:
        folder: with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files that it names.

    Raises:
        CheckpointError: a file is missing or damaged, or another has its tensors.
    """
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            file_of = dict(json.loads((folder / WEIGHTS_INDEX).read_text("utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} cannot be read: {error}") from None
    else:
        file_of = dict.fromkeys(header_of(folder / WEIGHTS), WEIGHTS)
    bad = sorted({str(file) for file in file_of.values() if not isinstance(file, str) or Path(file).name != file})
    if bad:
        raise CheckpointError(f"{folder / WEIGHTS_INDEX} names {bad[0]!r}, which is no file of the folder")
    tensors: dict[str, StoredTensor] = {}
    headers = {file: header_of(folder / file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        place = headers[file].get(name)
        if place is None:
            raise CheckpointError(f"{folder / file} has no {name}, which {WEIGHTS_INDEX} says it has")
        slices = (StoredSlice(file, name, (0,) * len(place.shape), place.shape, ()),)
        tensors[name] = StoredTensor(place.shape, place.dtype, slices)
    return Index(0, tensors)
