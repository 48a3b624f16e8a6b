"""Reads folders of ``torch.distributed.checkpoint``, whose metadata is a pickle, without running anything that is in them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint.index import DTYPES, Index, StoredSlice, StoredTensor
from shardwright.checkpoint.reading import Reader, overlaps
from shardwright.checkpoint.tensors import Bounds
from shardwright.errors import CheckpointError

METADATA = ".metadata"
_OF_CHECKPOINT = "torch.distributed.checkpoint"


class _Record:
    """An object of a pickle as data alone: what it was made of, and its attributes."""

    def __init__(self, *made_of: Any):
        self.made_of = made_of

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.made_of = tuple(state)


class _Data(pickle.Unpickler):
    """Makes records in place of objects, and refuses all that is not known to be data."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in DTYPES:
            return name
        known = module in (f"{_OF_CHECKPOINT}.metadata", f"{_OF_CHECKPOINT}.filesystem", f"{_OF_CHECKPOINT}.storage")
        if known or module == "pathlib" or (module, name) == ("torch.serialization", "_get_layout"):
            return _Record
        raise CheckpointError(f"it names {module}.{name}, which is no data of a checkpoint; it was not run")


def is_dcp(folder: Path) -> bool:
    """Tells whether a folder was written by ``torch.distributed.checkpoint``."""
    return (folder / METADATA).is_file()


def dcp_index(folder: Path) -> Index:
    """Describes the tensors of a folder by their names in it; what is no tensor is left out.

    Args:
        folder: with ``.metadata`` and ``.distcp`` files.

    Raises:
        CheckpointError: it is damaged, or has anything but data in it.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            data = _Data(file).load()
        files = {(index.fqn, index.__dict__.get("offset")): info.__dict__ for index, info in data.storage_data.items()}
        tensors: dict[str, StoredTensor] = {}
        for name, own in data.state_dict_metadata.items():
            if "chunks" not in own.__dict__:
                continue
            slices = []
            for chunk in own.chunks:
                info = files[name, chunk.offsets]
                if info.get("transform_descriptors"):
                    raise CheckpointError(f"{name} is compressed, which is not read; save it without transforms")
                place = f"{int(info['offset'])}:{int(info['length'])}"
                slices.append(StoredSlice(str(info["relative_path"]), place, chunk.offsets, chunk.sizes, ()))
            dtype = own.properties.made_of[0] if own.properties.made_of else own.properties.dtype
            tensors[name] = StoredTensor(tuple(own.size), dtype, tuple(slices))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    except Exception as error:  # of what a forged or damaged pickle makes of it
        raise CheckpointError(f"{path} is damaged or of another version ({type(error).__name__}: {error})") from None
    return Index(0, tensors)


class DcpReader(Reader):
    """Reads parts of tensors from ``.distcp`` files, a slice at a time.

    Args:
        folder: of the checkpoint.
    """

    has_checksums = False

    def check(self, stored: StoredSlice, dtype: str) -> None:
        """Raises an error if a slice cannot be read, which without checksums only reading it tells.

        Raises:
            CheckpointError: it cannot.
        """
        self._value(stored, dtype)

    def read(self, stored: Sequence[StoredSlice], dtype: str, bounds: Bounds, into: Tensor) -> None:
        """Copies a part of a tensor from the slices that hold it.

        Args:
            stored: the tensor's slices.
            dtype: of the tensor.
            bounds: first and last index of the part along every dim.
            into: gets the part; of its shape.

        Raises:
            CheckpointError: a file has something else there.
        """
        for own, _, here, there in overlaps(stored, bounds):
            into[there].copy_(self._value(own, dtype)[here])

    def _value(self, stored: StoredSlice, dtype: str) -> Tensor:
        path = self.folder / stored.file
        offset, length = map(int, stored.key.split(":"))
        if not path.is_file() or path.stat().st_size < offset + length:
            raise CheckpointError(f"{path} is missing or damaged: it has no {length} bytes at {offset}")
        with path.open("rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))
        self.bytes_read += length
        try:
            value = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # of what a forged or damaged file makes of it
            raise CheckpointError(f"{path} at {offset} is damaged: {error}") from None
        if not isinstance(value, Tensor) or tuple(value.shape) != stored.shape or value.dtype != DTYPES[dtype]:
            raise CheckpointError(f"{path} at {offset} has something else than {list(stored.shape)} of {dtype}")
        return value
