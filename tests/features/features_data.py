"""Data sets for tests, in a module of their own so that worker processes can have them."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


class Counted(Dataset):
    """Rows of four whose first number is their index; keeps a list of what was read."""

    def __init__(self, length):
        self.length, self.read = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([float(index), 0.0, 1.0, 2.0])


class Images(Dataset):
    """Images that tell their index, which is their label."""

    def __init__(self, length, width):
        self.images = torch.randn(length, 1, 6, width, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


class Noisy(Dataset):
    """Rows with an index and random numbers of three generators."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([index, float(torch.rand(1)), np.random.rand(), random.random()])


class Stream(IterableDataset):
    """The rows of ``Counted``, one after another."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        for index in range(self.length):
            yield torch.tensor([float(index), 0.0, 1.0, 2.0])
