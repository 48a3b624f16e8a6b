"""Reads a checkpoint's files: every byte is verified by one of the ranks that need it, then each copies what it holds.

Files are mapped into memory, so that a load needs none beside the tensors that it fills.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from shardwright.checkpoint.files import CHUNK, Place, read_header
from shardwright.checkpoint.index import DTYPES, StoredSlice, StoredTensor
from shardwright.checkpoint.tensors import Bounds
from shardwright.errors import CheckpointError

Slices = tuple[slice, ...]
Wanted = dict[str, set[Bounds]]  # parts of tensors that a rank needs, by name


class Share(NamedTuple):
    """Some MiB of a slice that one rank verifies: their numbers from ``first`` to ``last``."""

    stored: StoredSlice
    dtype: str
    first: int
    last: int


class Reader:
    """Verifies and reads parts of the slices of a checkpoint, and counts the bytes of files that it reads.

    Args:
        folder: of the checkpoint.
    """

    has_checksums = True

    def __init__(self, folder: Path):
        self.folder, self.bytes_read = folder, 0
        self._maps: dict[str, mmap.mmap] = {}
        self._verified: dict[tuple[str, str], list[tuple[int, int]]] = {}  # bytes of slices that were counted

    def place(self, stored: StoredSlice, dtype: str) -> Place:
        """Returns where a slice stands, if its file says of it what the index does.

        Args:
            stored: the slice.
            dtype: of the tensor.

        Raises:
            CheckpointError: the file is missing, damaged, or says something else.
        """
        path = self.folder / stored.file
        if (path.is_symlink() and self.has_checksums) or not path.is_file():  # caches of others are full of links
            raise CheckpointError(f"{path} is missing; restore it, or load an earlier step")
        status = path.stat()
        place = read_header(path, status.st_size, status.st_mtime_ns).get(stored.key)
        if place is None or (place.dtype, place.shape) != (dtype, stored.shape):
            there = "nothing" if place is None else f"{list(place.shape)} of {place.dtype}"
            raise CheckpointError(f"{path} has {there} at {stored.key}, the index {list(stored.shape)} of {dtype}")
        if self.has_checksums and len(stored.checksums) != -(-place.bytes // CHUNK):
            raise CheckpointError(f"{path}: {stored.key} has {len(stored.checksums)} checksums for {place.bytes} bytes")
        self._map(stored.file)
        return place

    def check(self, stored: StoredSlice, dtype: str) -> None:
        """Raises an error if the file of a slice cannot be read.

        Raises:
            CheckpointError: it cannot.
        """
        self.place(stored, dtype)

    def verify(self, share: Share) -> None:
        """Compares bytes with their checksums.

        Args:
            share: which.

        Raises:
            CheckpointError: some have another checksum.
        """
        stored, place = share.stored, self.place(share.stored, share.dtype)
        with memoryview(self._map(stored.file)) as view:
            for number in range(share.first, share.last):
                begin = place.first + number * CHUNK
                end = min(begin + CHUNK, place.first + place.bytes)
                if xxh3_64_hexdigest(view[begin:end]) != stored.checksums[number]:
                    raise CheckpointError(
                        f"{self.folder / stored.file} is damaged: {stored.key} has other bytes than were written; restore the "
                        "file, or load an earlier step"
                    )
        begin, end = share.first * CHUNK, min(share.last * CHUNK, place.bytes)
        self.bytes_read += max(end - begin, 0)
        self._verified.setdefault((stored.file, stored.key), []).append((begin, end))
        self._let_go(stored.file, place.first + begin, place.first + end)

    def read(self, stored: Sequence[StoredSlice], dtype: str, bounds: Bounds, into: Tensor) -> None:
        """Copies a part of a tensor from the slices that hold it, which some rank has verified.

        Args:
            stored: the tensor's slices.
            dtype: of the tensor.
            bounds: first and last index of the part along every dim.
            into: gets the part; of its shape.
        """
        for own, ends, here, there in overlaps(stored, bounds):
            place = self.place(own, dtype)
            source = self.tensor(own.file, place)
            into[there].copy_(source[here])
            first, last = _bytes_of_rows(ends, own, place.bytes)
            counted = self._verified.get((own.file, own.key), ())
            part = int(source[here].numel()) * source.element_size()
            again = sum(max(0, min(last, b) - max(first, a)) for a, b in counted)
            self.bytes_read += part if last == first else part * (last - first - again) // (last - first)
            self._let_go(own.file, place.first + first, place.first + last)

    def chunks(self, stored: StoredSlice, dtype: str, bounds: Bounds) -> tuple[int, int]:
        """Returns the numbers of the MiB of a slice that hold a part of its tensor: first and last, equal without any.

        Args:
            stored: the slice.
            dtype: of the tensor.
            bounds: the part.
        """
        ends = common(bounds, stored)
        if ends is None:
            return 0, 0
        first, last = _bytes_of_rows(ends, stored, self.place(stored, dtype).bytes)
        return first // CHUNK, -(-last // CHUNK)

    def tensor(self, file: str, place: Place) -> Tensor:
        """Returns what is at a place of a file as a tensor of mapped memory, not read yet.

        Args:
            file: its name.
            place: the place.
        """
        dtype = DTYPES[place.dtype]
        if not place.bytes:
            return torch.empty(place.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is read only, and is not written
            flat = torch.frombuffer(self._map(file), dtype=torch.uint8, count=place.bytes, offset=place.first)
        if place.first % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(place.shape)

    def _map(self, file: str) -> mmap.mmap:
        """Maps a file; what is mapped stays readable, whatever becomes of the folder."""
        if file not in self._maps:
            with (self.folder / file).open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def _let_go(self, file: str, first: int, last: int) -> None:
        """Tells the system that bytes of a file are not needed in memory any more."""
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            begin = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._map(file).madvise(mmap.MADV_DONTNEED, begin, last - begin)


def shares(reader: Reader, tensors: Mapping[str, StoredTensor], wanted: Sequence[Wanted], rank: int) -> Iterator[Share]:
    """Yields what a rank verifies of what the ranks of a job need: each MiB once, by one of those that need it.

    Args:
        reader: of the checkpoint.
        tensors: all of it, by name.
        wanted: what each rank needs.
        rank: this one.

    Raises:
        CheckpointError: a file is missing, damaged, or says something else than the index.
    """
    ranks_of: dict[str, dict[Bounds, list[int]]] = {name: {} for name in wanted[rank]}
    for number, needs in enumerate(wanted):
        for name in needs.keys() & ranks_of.keys():
            for bounds in needs[name]:
                ranks_of[name].setdefault(bounds, []).append(number)
    for name, by_bounds in ranks_of.items():
        dtype = tensors[name].dtype
        for stored in tensors[name].slices:
            if all(common(bounds, stored) is None for bounds in wanted[rank][name]):
                continue
            needed = [(*reader.chunks(stored, dtype, bounds), ranks) for bounds, ranks in by_bounds.items()]
            cuts = sorted({end for first, last, _ in needed for end in (first, last) if first < last})
            for begin, end in pairwise(cuts):
                who = sorted({r for first, last, ranks in needed if first <= begin and end <= last for r in ranks})
                if rank in who:
                    at, count = who.index(rank), len(who)
                    own = begin + (end - begin) * at // count, begin + (end - begin) * (at + 1) // count
                    if own[0] < own[1]:
                        yield Share(stored, dtype, *own)


def overlaps(stored: Sequence[StoredSlice], bounds: Bounds) -> Iterator[tuple[StoredSlice, Bounds, Slices, Slices]]:
    """Yields each slice that overlaps a part: the slice, the overlap, and where it is in both.

    Args:
        stored: the slices of a tensor.
        bounds: the part.
    """
    for own in stored:
        ends = common(bounds, own)
        if ends is not None:
            here = tuple(slice(a - start, b - start) for (a, b), start in zip(ends, own.start, strict=True))
            there = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(ends, bounds, strict=True))
            yield own, ends, here, there


def common(bounds: Bounds, stored: StoredSlice) -> Bounds | None:
    """Returns what a part and a slice of a tensor have in common; ``None`` for nothing.

    >>> common(((0, 4), (0, 8)), StoredSlice("a.safetensors", "a", (2, 0), (4, 4), ()))
    ((2, 4), (0, 4))
    """
    ends = tuple((max(a, s), min(b, s + n)) for (a, b), s, n in zip(bounds, stored.start, stored.shape, strict=True))
    return None if any(a >= b for a, b in ends) else ends


def _bytes_of_rows(ends: Bounds, stored: StoredSlice, size: int) -> tuple[int, int]:
    """Returns the first and last byte of a slice of so many bytes that its rows within the ends take."""
    if not stored.shape:
        return 0, size
    row = size // stored.shape[0]
    return (ends[0][0] - stored.start[0]) * row, (ends[0][1] - stored.start[0]) * row
