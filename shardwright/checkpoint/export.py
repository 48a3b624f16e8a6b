"""Exports checkpoints: to Hugging Face weights, to ``torch.distributed.checkpoint``, to one file of ``torch.save``."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint

from shardwright.checkpoint.files import header_of, sync
from shardwright.checkpoint.huggingface import WEIGHTS, WEIGHTS_INDEX
from shardwright.checkpoint.reading import Reader
from shardwright.checkpoint.rewrite import Part, Progress, check, write_parts
from shardwright.checkpoint.source import Source
from shardwright.checkpoint.tensors import whole
from shardwright.errors import CheckpointError


def to_huggingface(source: Source, folder: Path, progress: Progress, shard: int = 5 * 10**9, dtype: str | None = None) -> None:
    """Writes the model of a checkpoint as Hugging Face weights, in files of a limited size; of tied tensors one.

    Args:
        source: the checkpoint.
        folder: for ``model.safetensors``, or for several files and their index; ``config.json`` is the user's.
        progress: told bytes, first as they are verified, then as they are written.
        shard: the most bytes of a file, unless a single tensor has more.
        dtype: that floating tensors are converted to.

    Raises:
        CheckpointError: it is damaged, or has several models.
    """
    names = _names_of_model(source)
    check(source, progress, list(names))
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Part]] = [[]]
    for name, own in names.items():
        tensor = source.index.tensors[name]
        part = Part(own, name, tensor.dtype, whole(tensor.shape))
        if shards[-1] and sum(p.bytes for p in shards[-1]) + part.bytes > shard:
            shards.append([])
        shards[-1].append(part)
    file_of: dict[str, str] = {}
    for number, parts in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_parts(folder / file, parts, source, progress, dtype)
        file_of.update(dict.fromkeys((part.key for part in parts), file))
    if len(shards) > 1:
        total = sum(part.bytes for parts in shards for part in parts)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}, indent=2)
        (folder / WEIGHTS_INDEX).write_text(text, "utf-8")
        sync(folder / WEIGHTS_INDEX)


def to_dcp(source: Source, folder: Path, progress: Progress, dtype: str | None = None) -> None:
    """Writes all tensors of a checkpoint for ``torch.distributed.checkpoint``, by the names that they have in it.

    Args:
        source: the checkpoint.
        folder: for ``.metadata`` and ``.distcp`` files.
        progress: told bytes, first as they are verified, then as they are written to a file between.
        dtype: that floating tensors are converted to.

    Raises:
        CheckpointError: it is damaged.
    """

    def write(state: dict[str, torch.Tensor]) -> None:
        state |= {name: state[tied] for name, tied in source.index.aliases.items() if tied in state}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no other ranks
            torch_checkpoint.save(state, checkpoint_id=folder, no_dist=True)

    _through_a_file(source, {name: name for name in source.index.tensors}, folder.parent, write, progress, dtype)


def to_torch(source: Source, path: Path, progress: Progress, dtype: str | None = None) -> None:
    """Writes the model's ``state_dict`` as one file of ``torch.save``; tied tensors stand there by all their names.

    Args:
        source: the checkpoint.
        path: the file.
        progress: told bytes, first as they are verified, then as they are written to a file between.
        dtype: that floating tensors are converted to.

    Raises:
        CheckpointError: it is damaged, or has several models.
    """
    aliases = {a.removeprefix("model."): b.removeprefix("model.") for a, b in source.index.aliases.items()}

    def write(state: dict[str, torch.Tensor]) -> None:
        torch.save({**state, **{name: state[tied] for name, tied in aliases.items() if tied in state}}, path)

    _through_a_file(source, _names_of_model(source), path.parent, write, progress, dtype)


def _through_a_file(
    source: Source, names: dict[str, str], folder: Path, write: Callable[[dict[str, torch.Tensor]], None], progress: Progress,
    dtype: str | None,
) -> None:  # fmt: skip
    """Writes whole tensors to a file beside, whose mapped memory is then written; so they need not fit into memory.

    Args:
        source: the checkpoint.
        names: of its tensors, and what they are called for others.
        folder: for the file.
        write: writes the tensors.
        progress: told bytes.
        dtype: that floating tensors are converted to.
    """
    check(source, progress, list(names))
    folder.mkdir(parents=True, exist_ok=True)
    parts = [Part(own, n, source.index.tensors[n].dtype, whole(source.index.tensors[n].shape)) for n, own in names.items()]
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        file = Path(beside) / WEIGHTS
        write_parts(file, parts, source, progress, dtype)
        mapped = Reader(file.parent)
        write({key: mapped.tensor(file.name, place) for key, place in header_of(file).items()})


def _names_of_model(source: Source) -> dict[str, str]:
    """Returns the names of a model's tensors, and what they are within the model."""
    found = {name: name.removeprefix("model.") for name in source.index.tensors if name.startswith("model.")}
    if not found:
        tops = sorted({name.split(".")[0] for name in source.index.tensors})
        raise CheckpointError(f"{source.path} has no model: its tensors are of {', '.join(tops) or 'nothing'}")
    return found


def size_of(source: Source) -> int:
    """Returns the bytes of all tensors."""
    return sum(tensor.bytes for tensor in source.index.tensors.values())
