"""Handwritten digits for the examples: scikit-learn's, or MNIST's where the variable DATA_PATH names its folder.

Without DATA_PATH nothing is downloaded: scikit-learn carries 1,797 digits of 8x8 pixels, which are scaled to MNIST's
28x28 so that the same models take either.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 28
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to [0, 1]

_IDX_UINT8 = 0x08


def load_digits(path: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Returns all images and labels, in the order in which they are stored.

    Args:
        path: a folder with MNIST's two training files in IDX format, compressed or not; they may also lie in its
            subfolder `train`. Default: the environment variable DATA_PATH; where that is unset or empty, scikit-learn's
            digits.

    Returns:
        images: float32 (N, 1, 28, 28), pixels in [0, 1] normalised with MNIST's mean and deviation; labels: int64 (N,).

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is not what its name says.
        ImportError: there is neither a folder nor scikit-learn.

    Example:
        >>> images, labels = load_digits()
        >>> images.shape[1:], labels.dtype
        (torch.Size([1, 28, 28]), torch.int64)
    """
    path = path or os.environ.get("DATA_PATH")
    pixels, labels = _read_mnist(Path(path)) if path else _scikit_learn_digits()
    return (pixels.unsqueeze(1) - MEAN) / STD, labels


def batches(batch_size: int, epochs: int = 1, *, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates over the digits in shuffled batches: the same ones for the same seed, on every rank and in every run.

    Each epoch has its own order. A last batch that would be shorter than the others is dropped. The shuffling has its
    own generator, so a model's dropout and initial weights do not depend on how many batches were drawn.

    Args:
        batch_size: images in a batch.
        epochs: how often to go through the data.
        seed: of the shuffling.

    Returns:
        An iterator over (images, labels), shaped as `load_digits` says, with N = batch_size.

    Raises:
        ValueError: no batch of this size can be made. See `load_digits` for what else can go wrong.

    Example:
        >>> images, labels = next(batches(32))
        >>> images.shape
        torch.Size([32, 1, 28, 28])
    """
    images, labels = load_digits()
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"batch_size is {batch_size}, and there are {len(images)} images: give 1 to {len(images)}")
    return _shuffled(images, labels, batch_size, epochs, torch.Generator().manual_seed(seed))


def read_idx(path: Path, ndim: int) -> Tensor:
    """Reads a file in IDX format, plain or compressed with gzip, of unsigned bytes.

    The format: two zero bytes, a byte for the element type (8: unsigned byte), a byte for the number of dims; then the
    size of each dim as a big-endian 32-bit number; then the elements, the last dim fastest.
    (http://yann.lecun.com/exdb/mnist/)

    Args:
        path: the file.
        ndim: the number of dims it has to have: 3 for images, 1 for labels.

    Returns:
        uint8, with `ndim` dims.

    Raises:
        ValueError: the file is something else, or not complete.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":  # by content, not by name: both spellings occur unpacked under the packed name
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}. Download it again.") from error
    magic, expected = raw[:4], bytes((0, 0, _IDX_UINT8, ndim))
    if magic != expected:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} dim(s): "
            f"it begins with {magic.hex(' ') or 'nothing'}, where {expected.hex(' ')} should stand."
        )
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise ValueError(f"{path} ends within its header: it has {len(raw)} of {header} bytes. Download it again.")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    elements = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[header:]
    if elements.numel() != torch.Size(shape).numel():
        raise ValueError(
            f"{path} says it holds {' x '.join(map(str, shape))} = {torch.Size(shape).numel()} elements, "
            f"and {elements.numel()} follow. Download it again."
        )
    return elements.reshape(shape)


def _shuffled(
    images: Tensor, labels: Tensor, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                yield images[chosen], labels[chosen]


def _scikit_learn_digits() -> tuple[Tensor, Tensor]:
    """Returns pixels (N, 28, 28) in [0, 1] and labels (N,)."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "The digits come from scikit-learn: pip install scikit-learn, "
            "or let the environment variable DATA_PATH name a folder with MNIST's files."
        ) from error
    digits = datasets.load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32) / 16  # scikit-learn counts to 16
    pixels = F.interpolate(small.unsqueeze(1), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return pixels.squeeze(1), torch.tensor(digits.target, dtype=torch.int64)


def _read_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Returns pixels (N, 28, 28) in [0, 1] and labels (N,)."""
    images_path, labels_path = _find(folder, "train-images", "idx3-ubyte"), _find(folder, "train-labels", "idx1-ubyte")
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if images.shape[1:] != (SIZE, SIZE):
        height, width = images.shape[1:]
        raise ValueError(f"{images_path} holds images of {height}x{width} pixels; the examples take {SIZE}x{SIZE}.")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels: "
            "they are not of the same data set."
        )
    return images.to(torch.float32) / 255, labels.to(torch.int64)


def _find(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{joint}{kind}{suffix}" for joint in "-." for suffix in ("", ".gz")]
    for place in (folder, folder / "train"):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise FileNotFoundError(
        f"{folder} has no file {' or '.join(names)}, nor has its subfolder train. Set DATA_PATH to the folder that "
        "has MNIST's files, or unset it to take scikit-learn's digits."
    )
