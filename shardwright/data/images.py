"""Cuts an image into a grid of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from shardwright.errors import ArgumentTypeError, ShardwrightError

MODES = ("pad", "drop")


class SlicePatches:
    """Cuts images into ``num_height`` times ``num_width`` patches of one size, row by row.

    A :class:`~shardwright.data.Loader` cuts images by itself. This is for data sets that return patches, where all patches
    must have one size, and for anything else that works on patches. Calling it with images ``(..., H, W)`` gives a tuple of
    patches ``(..., H', W')``.

    Args:
        num_height, num_width: patches along each side.
        slice_mode: what happens where a side is no multiple of its number of patches: ``"pad"`` adds rows at the bottom
            and columns at the right, ``"drop"`` leaves out those that are too many.
        fill_value: the value to pad with, 0 to 255.

    Raises:
        ArgumentTypeError: an argument of the wrong type.
        ShardwrightError: a number below 1, an unknown mode, a fill value out of range; when called, an image with fewer
            dims than two, or one that ``"drop"`` leaves nothing of.

    >>> import torch
    >>> left, right = SlicePatches(num_width=2)(torch.arange(6.0).view(1, 2, 3))
    >>> right
    tensor([[[2., 0.],
             [5., 0.]]])
    """

    def __init__(self, num_height: int = 1, num_width: int = 1, slice_mode: str = "pad", fill_value: int = 0):
        for name, number in (("num_height", num_height), ("num_width", num_width), ("fill_value", fill_value)):
            if not isinstance(number, int) or isinstance(number, bool):
                raise ArgumentTypeError(f"SlicePatches({name}={number!r}): give an int, not a {type(number).__name__}")
        for name, number in (("num_height", num_height), ("num_width", num_width)):
            if number < 1:
                raise ShardwrightError(f"SlicePatches({name}={number}): cut each side into at least 1 patch")
        if not isinstance(slice_mode, str):
            raise ArgumentTypeError(f"SlicePatches(slice_mode={slice_mode!r}): give 'pad' or 'drop'")
        if slice_mode not in MODES:
            raise ShardwrightError(f"SlicePatches(slice_mode={slice_mode!r}) is unknown; give 'pad' or 'drop'")
        if not 0 <= fill_value <= 255:
            raise ShardwrightError(f"SlicePatches(fill_value={fill_value}): give a value from 0 to 255")
        self.num_height, self.num_width = num_height, num_width
        self.slice_mode, self.fill_value = slice_mode, fill_value

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        even = self.even(image)
        rows = even.tensor_split(self.num_height, dim=-2)
        return tuple(patch for row in rows for patch in row.tensor_split(self.num_width, dim=-1))

    def even(self, image: Tensor) -> Tensor:
        """Pads or crops the image, so that its patches have one size.

        Raises:
            ArgumentTypeError: the image is no tensor. ShardwrightError: nothing of it is left to make patches of.
        """
        if not isinstance(image, Tensor):
            raise ArgumentTypeError(f"SlicePatches takes a tensor (..., H, W), not a {type(image).__name__}; convert it first")
        if image.ndim < 2:
            raise ShardwrightError(f"SlicePatches takes images (..., H, W), not a tensor of {image.ndim} dims")
        (height, width), counts = image.shape[-2:], (self.num_height, self.num_width)
        if self.slice_mode == "pad":
            bottom, right = (-size % count for size, count in zip((height, width), counts))
            return F.pad(image, (0, right, 0, bottom), value=self.fill_value) if bottom or right else image
        kept = [size - size % count for size, count in zip((height, width), counts)]
        if 0 in kept:
            raise ShardwrightError(
                f"SlicePatches: an image of {height}x{width} has nothing left of {counts[0]}x{counts[1]} patches; "
                "use slice_mode='pad'"
            )
        return image[..., : kept[0], : kept[1]]

    def of_rank(self, image: Tensor, rank: int, size: int) -> Tensor:
        """Returns the patch of one rank of ``size``, as slice counts assign them.

        Ranks beyond the number of patches share them: neighbours have the same patch.

        Raises:
            ShardwrightError: the patches do not divide the ranks.

        >>> import torch
        >>> SlicePatches(num_width=2).of_rank(torch.arange(4.0).view(1, 4), rank=1, size=4)
        tensor([[0., 1.]])
        """
        patches = self.num_height * self.num_width
        if size % patches:
            raise ShardwrightError(
                f"SlicePatches: {self.num_height}x{self.num_width} = {patches} patches do not divide {size} ranks; use "
                f"a number among {[n for n in range(1, size + 1) if size % n == 0]}"
            )
        return self(image)[rank // (size // patches)]

    def __repr__(self) -> str:
        given: dict[str, Any] = vars(self)
        return f"SlicePatches({', '.join(f'{name}={value!r}' for name, value in given.items())})"
