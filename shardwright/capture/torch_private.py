"""The only door to PyTorch's private modules."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.traceback import annotate, preserve_node_meta

__all__ = ["FakeTensor", "FakeTensorMode", "annotate", "preserve_node_meta"]
