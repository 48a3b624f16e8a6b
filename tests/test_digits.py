"""The data of the handwritten-digits examples: scikit-learn's digits and MNIST's files."""

import gzip
import itertools
import re
import struct
from pathlib import Path

import pytest
import torch

import digits

IMAGES = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([7, 0, 9, 3, 1], dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _no_data_path(monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)


def idx(tensor, kind=0x08):
    """The bytes of an IDX file, written independently of the reader."""
    return struct.pack(f">HBB{tensor.ndim}I", 0, kind, tensor.ndim, *tensor.shape) + bytes(tensor.flatten().tolist())


def write(folder: Path, images_name="train-images-idx3-ubyte", labels_name="train-labels-idx1-ubyte", **content):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        (images_name, content.get("images", idx(IMAGES))),
        (labels_name, content.get("labels", idx(LABELS))),
    ):
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("subfolder", ["", "train"])
def test_mnist_files_are_read_under_every_spelling(tmp_path, monkeypatch, joint, suffix, subfolder):
    write(tmp_path / subfolder, f"train-images{joint}idx3-ubyte{suffix}", f"train-labels{joint}idx1-ubyte{suffix}")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    images, labels = digits.load_digits()
    assert images.shape == (5, 1, 28, 28)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images * 0.3081 + 0.1307, IMAGES.unsqueeze(1).float() / 255)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 0, 9, 3, 1]


def test_an_argument_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "absent"))
    assert len(digits.load_digits(write(tmp_path / "here"))[0]) == 5


def test_a_file_that_is_not_there_is_named(tmp_path):
    write(tmp_path, labels_name="t10k-labels-idx1-ubyte")
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz"):
        digits.load_digits(tmp_path)


BAD_FILES = {
    "labels for images": ({"images": idx(LABELS)}, "with 3 dim.*begins with 00 00 08 01, where 00 00 08 03"),
    "int16": ({"labels": idx(LABELS, kind=0x0B)}, "begins with 00 00 0b 01"),
    "little endian": ({"labels": struct.pack("<II", 2049, 5) + bytes(5)}, "begins with 01 08 00 00"),
    "empty": ({"labels": b""}, "begins with nothing"),
    "header cut": ({"images": idx(IMAGES)[:10]}, "has 10 of 16 bytes"),
    "cut": ({"images": idx(IMAGES)[:-1]}, "5 x 28 x 28 = 3920 elements, and 3919 follow"),
    "header only": ({"labels": idx(LABELS)[:8]}, "5 = 5 elements, and 0 follow"),
    "too long": ({"labels": idx(LABELS) + b"x"}, "5 = 5 elements, and 6 follow"),
    "gzip cut": ({"images": gzip.compress(idx(IMAGES))[:-20]}, "damaged gzip file"),
    "image size": ({"images": idx(IMAGES[:, :, 1:])}, "images of 28x27 pixels; the examples take 28x28"),
    "other data set": ({"labels": idx(LABELS[:4])}, "5 images and .* 4 labels"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, case):
    content, reason = BAD_FILES[case]
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{reason}"):
        digits.load_digits(write(tmp_path, **content))


def test_scikit_learn_digits_look_like_mnist():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    source = sklearn_datasets.load_digits()
    images, labels = digits.load_digits()
    assert images.shape == (1797, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == source.target.tolist()
    pixels = images * digits.STD + digits.MEAN
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-6)
    # Bilinear scaling written out: pixel i of 28 lies at (i + 1/2) * 8/28 - 1/2 of the source, within its edges, and
    # takes the sources next to it in proportion.
    at = ((torch.arange(28) + 0.5) * 8 / 28 - 0.5).clamp(0, 7)
    weights = (1 - (at[:, None] - torch.arange(8)).abs()).clamp(min=0)
    expected = weights @ torch.tensor(source.images, dtype=torch.float32) / 16 @ weights.T
    torch.testing.assert_close(pixels.squeeze(1), expected, atol=1e-5, rtol=0)


def test_batches_are_whole_shuffled_and_cover_the_epoch():
    images, labels = digits.load_digits()
    epoch = list(digits.batches(500))
    assert [len(x) for x, _ in epoch] == [500, 500, 500]  # 1797 = 3 * 500 + 297
    position = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    assert len(position) == 1797  # no two images are alike, so an image says where it stood
    order = [position[image.numpy().tobytes()] for x, _ in epoch for image in x]
    assert len(set(order)) == 1500
    assert order != sorted(order)
    assert torch.cat([y for _, y in epoch]).tolist() == labels[order].tolist()


def test_batches_repeat_by_seed_and_differ_by_epoch():
    first, second = ([y.tolist() for _, y in digits.batches(600, epochs=2, seed=3)] for _ in range(2))
    assert len(first) == 4
    assert first == second
    assert first[:2] != first[2:]
    assert first != [y.tolist() for _, y in digits.batches(600, epochs=2, seed=4)]


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    list(itertools.islice(digits.batches(32), 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [0, -1, 6])
def test_a_batch_size_without_batches_is_refused_at_once(tmp_path, monkeypatch, batch_size):
    monkeypatch.setenv("DATA_PATH", str(write(tmp_path)))
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, and there are 5 images"):
        digits.batches(batch_size)
    assert len(list(digits.batches(5))) == 1
