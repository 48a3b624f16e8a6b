"""Convolutions, pooling and resampling, proved by splitting them: even, uneven and empty pieces, groups, strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.rules.conv import add_channel_bias
from shardwright.rules.pieces import unless_empty, unless_empty_one
from shardwright.testing.rules import check_rule
from tests.rules.splits import doubles, free_dims

aten = torch.ops.aten
Case = tuple[Callable[..., Any], tuple[Any, ...], tuple[str, ...]]

LINE, PICTURE, VOLUME = doubles(2, 4, 7), doubles(2, 4, 5, 6), doubles(2, 3, 4, 4, 4)
ODD = doubles(3, 5, 6, 6)

# name -> function, its arguments, the dims that may be split of each input and then of each output
CONVOLUTIONS: dict[str, Case] = {
    "conv1d": (F.conv1d, (LINE, doubles(3, 4, 2), doubles(3)), ("01", "01", "0", "01")),
    "conv1d of one line": (F.conv1d, (LINE[0], doubles(3, 4, 2), doubles(3)), ("0", "01", "0", "0")),
    "conv2d": (F.conv2d, (PICTURE, doubles(6, 4, 3, 3), doubles(6)), ("01", "01", "0", "01")),
    "conv2d without bias": (F.conv2d, (ODD, doubles(2, 5, 2, 3)), ("01", "01", "01")),
    "conv2d of one channel": (F.conv2d, (doubles(3, 1, 4, 4), doubles(1, 1, 2, 2)), ("01", "01", "01")),
    "conv2d with stride": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 2), dilation=2),
        (ODD, doubles(4, 5, 2, 2), doubles(4)),
        ("01", "01", "0", "01"),
    ),
    "conv2d same": (
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
        (PICTURE, doubles(3, 4, 3, 2), doubles(3)),
        ("01", "01", "0", "01"),
    ),
    "conv2d in groups": (
        lambda x, w, b: F.conv2d(x, w, b, groups=3),
        (doubles(2, 6, 4, 4), doubles(12, 2, 3, 3), doubles(12)),
        ("01", "0", "0", "01"),
    ),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, groups=5), (ODD, doubles(5, 1, 3, 3)), ("01", "0", "01")),
    "conv3d": (F.conv3d, (VOLUME, doubles(2, 3, 2, 2, 2), doubles(2)), ("01", "01", "0", "01")),
    "convolution": (
        lambda x, w, b: torch.convolution(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        (PICTURE, doubles(3, 4, 2, 2), doubles(3)),
        ("01", "01", "0", "01"),
    ),
    "convolution transposed": (
        lambda x, w, b: torch.convolution(x, w, b, [2, 2], [0, 0], [1, 1], True, [1, 1], 2),
        (PICTURE, doubles(4, 3, 2, 2), doubles(6)),
        ("01", "0", "0", "01"),
    ),
    "conv_transpose1d": (F.conv_transpose1d, (LINE, doubles(4, 3, 2), doubles(3)), ("01", "01", "0", "01")),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, output_padding=1),
        (ODD, doubles(5, 4, 3, 3), doubles(4)),
        ("01", "01", "0", "01"),
    ),
    "conv_transpose2d in groups": (
        lambda x, w: F.conv_transpose2d(x, w, groups=2), (PICTURE, doubles(4, 3, 2, 2)), ("01", "0", "01"),
    ),
    "conv_transpose3d": (F.conv_transpose3d, (VOLUME, doubles(3, 2, 2, 2, 2)), ("01", "01", "01")),
}  # fmt: skip

PLANES: dict[str, Case] = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (LINE,), ("01", "01")),
    "max_pool1d_with_indices": (lambda x: F.max_pool1d(x, 2, return_indices=True), (LINE,), ("01", "01", "01")),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2, stride=1, padding=1), (ODD,), ("01", "01")),
    "max_pool2d of one picture": (lambda x: F.max_pool2d(x, 2), (ODD[0],), ("0", "0")),
    "max_pool2d_with_indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), (ODD,), ("01", "01", "01")),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (VOLUME,), ("01", "01")),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (LINE,), ("01", "01")),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, ceil_mode=True), (ODD,), ("01", "01")),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (VOLUME,), ("01", "01")),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), (LINE,), ("01", "01")),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (1, 2)), (ODD,), ("01", "01")),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 2), (VOLUME,), ("01", "01")),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 3), (LINE,), ("01", "01", "01")),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (ODD,), ("01", "01", "01")),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), (VOLUME,), ("01", "01", "01")),
    "upsample_nearest1d": (lambda x: F.interpolate(x, scale_factor=2), (LINE,), ("01", "01")),
    "upsample_nearest2d": (lambda x: F.interpolate(x, size=(4, 9)), (ODD,), ("01", "01")),
    "upsample_nearest3d": (lambda x: F.interpolate(x, scale_factor=2), (VOLUME,), ("01", "01")),
    "_upsample_nearest_exact2d": (
        lambda x: F.interpolate(x, size=(4, 9), mode="nearest-exact"), (ODD,), ("01", "01"),
    ),
    "upsample_linear1d": (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), (LINE,), ("01", "01")),
    "upsample_bilinear2d": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (ODD,), ("01", "01")),
    "upsample_bicubic2d": (lambda x: F.interpolate(x, size=(3, 8), mode="bicubic"), (ODD,), ("01", "01")),
    "upsample_trilinear3d": (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (VOLUME,), ("01", "01")),
    "_upsample_bilinear2d_aa": (
        lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True), (ODD,), ("01", "01"),
    ),
}  # fmt: skip

CHANNELS: dict[str, Case] = {
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (doubles(2, 12, 2, 3),), ("0123", "0123")),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 3), (doubles(2, 2, 6, 3),), ("012", "012")),
    "pixel_shuffle of one picture": (lambda x: F.pixel_shuffle(x, 2), (doubles(4, 5, 2),), ("12", "12")),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (PICTURE,), ("023", "023")),
    "im2col": (lambda x: F.unfold(x, 2), (ODD,), ("01", "01")),
    "im2col of one picture": (lambda x: F.unfold(x, 2), (ODD[0],), ("0", "0")),
    "col2im": (lambda x: F.fold(x, (4, 4), 2), (doubles(3, 12, 9),), ("01", "01")),
    "grid_sampler": (
        lambda x, g: F.grid_sample(x, g, align_corners=False), (PICTURE, doubles(2, 3, 5, 2)), ("01", "012", "0123"),
    ),
}  # fmt: skip

CASES = {**CONVOLUTIONS, **PLANES, **CHANNELS}


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_whole_computes(name: str) -> None:
    function, args, _ = CASES[name]
    assert check_rule(function, *args, limit=16) > 2


@pytest.mark.parametrize("name", CASES)
def test_may_be_split_where_it_is_promised(name: str) -> None:
    function, args, free = CASES[name]
    assert free_dims(function, *args) == free


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.affine_grid(x[:, :, :3, 0], [2, 4, 3, 3], align_corners=False),
        lambda x: F.conv2d(x[:0], x[:, :, :2, :2]),
    ],
    ids=["affine_grid", "convolution of nothing"],
)
def test_what_has_no_rule(function: Callable[..., Any]) -> None:
    assert free_dims(function, doubles(2, 2, 3, 3)) == ()


@pytest.mark.parametrize("empty", ["n", "o", "c"])
def test_a_convolution_with_an_empty_side_is_zeros_that_depend_on_its_inputs(empty: str) -> None:
    n, o, c = (0 if side == empty else 2 for side in "noc")
    x, w = doubles(n, c, 4, 4).requires_grad_(), doubles(o, c, 2, 2).requires_grad_()
    y = unless_empty_one(aten.conv2d.default, [n, o, 3, 3], torch.float64, x, w)
    assert y.shape == (n, o, 3, 3)
    assert not y.any()
    for tensor, gradient in zip((x, w), torch.autograd.grad(y.sum(), (x, w))):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_an_empty_piece_has_the_dtype_of_the_others() -> None:
    values, indices = unless_empty(
        aten.max_pool2d_with_indices.default,
        [(2, 0, 1, 1)] * 2,
        [torch.bfloat16, torch.int64],
        torch.ones(2, 0, 2, 2),
        2,
    )
    assert (values.dtype, values.shape) == (torch.bfloat16, (2, 0, 1, 1))
    assert (indices.dtype, indices.shape) == (torch.int64, (2, 0, 1, 1))


def test_the_bias_is_added_once_to_the_reduced_sum() -> None:
    x: Tensor = torch.zeros(2, 3, 4)
    assert torch.equal(add_channel_bias(x, torch.arange(3.0), 1), torch.arange(3.0).view(1, 3, 1).expand(2, 3, 4))
    assert torch.equal(add_channel_bias(x[0], torch.arange(3.0), 1), torch.arange(3.0).view(3, 1).expand(3, 4))
    assert add_channel_bias(x.bfloat16(), torch.arange(3.0), 1).dtype == torch.bfloat16  # as autocast has it
