"""Opens a folder of weights, whoever wrote it: an index of its tensors, and a reader of their parts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwright.checkpoint.dcp import DcpReader, dcp_index, is_dcp
from shardwright.checkpoint.folder import newest, steps_in
from shardwright.checkpoint.huggingface import huggingface_index, is_huggingface
from shardwright.checkpoint.index import NAME, Index, StoredTensor, check_tensors, read_index
from shardwright.checkpoint.reading import Reader

# What checkpoints are of, at the top of names. Where others have more, they are names within a model.
_PARTS = {"model", "optimizer", "optim", "scheduler", "scaler", "loader", "random", "extra"}


@dataclass(frozen=True)
class Source:
    """A folder of weights that was opened.

    Args:
        format: ``"shardwright"``, ``"huggingface"``, ``"dcp"``, or ``"ranks"`` for folders of ranks.
        path: the folder.
        index: of its tensors.
        reader: of their parts.
    """

    format: str
    path: Path
    index: Index
    reader: Reader


def find_source(folder: Path, step: int | None = None) -> Path:
    """Returns the folder that is meant: one of weights of others itself, or that of a step.

    Args:
        folder: what was given.
        step: which one of ours; ``None``: the newest.

    Raises:
        CheckpointError: there is none.
    """
    is_ours = step is not None or (folder / NAME).is_file() or bool(steps_in(folder))
    return folder if not is_ours and (is_huggingface(folder) or is_dcp(folder)) else newest(folder, step)


def open_source(path: Path) -> Source:
    """Opens a folder that :func:`find_source` found.

    Args:
        path: the folder.

    Raises:
        CheckpointError: it is damaged or forged; all that is wrong is listed.
    """
    if not (path / NAME).is_file() and is_huggingface(path):
        reader = Reader(path)
        reader.has_checksums = False
        return Source("huggingface", path, huggingface_index(path), reader)
    if not (path / NAME).is_file() and is_dcp(path):
        index = dcp_index(path)
        check_tensors(path, index.tensors)
        return Source("dcp", path, index, DcpReader(path))
    return Source("shardwright", path, read_index(path), Reader(path))


def as_ours(source: Source) -> Source:
    """Gives the tensors of others the names that ours have: those of a model begin with ``model.``.

    Args:
        source: a folder of weights.
    """
    names = source.index.tensors
    tops = {name.split(".")[0] for name in names}
    has_parts = source.format == "dcp" and "model" in tops and tops <= _PARTS
    if source.format == "shardwright" or has_parts:
        return source
    beside = _PARTS - {"model"} if source.format == "ranks" else set()
    tensors = {name if name.split(".")[0] in beside else f"model.{name}": tensor for name, tensor in names.items()}
    return replace(source, index=replace(source.index, tensors=tensors))


def renamed(index: Index, own: Collection[str], model: Any) -> tuple[Index, list[str]]:
    """Gives the tensors of others the names that a model's have in checkpoints.

    Args:
        index: of the tensors by their names there.
        own: the model's names, each beginning with ``model.``.
        model: may say what its class is called in whole models (``base_model_prefix``), and which names are no longer used.

    Returns:
        The index, and problems: names that the model does not have.
    """
    base = getattr(model, "base_model_prefix", "") or ""
    unused = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    has_parts = any(name in own for name in index.tensors)
    for name, tensor in index.tensors.items():
        if has_parts and not name.startswith("model."):
            continue  # an optimizer's, or of whatever else trains
        candidates = [f"model.{name}", f"model.{base}.{name}", f"model.{name.removeprefix(f'{base}.')}", name]
        known = next((c for c in candidates if c in own), None)
        if known is not None:
            found.setdefault(known, tensor)
        elif not any(pattern.search(name) for pattern in unused):
            problems.append(f"{name} is in the checkpoint and not in the model")
    return replace(index, tensors=found), problems
