"""Hand-written tensor parallelism, Megatron style: the program an expert would write for these models and strategies."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Copy(torch.autograd.Function):
    """Identity forward, all-reduce backward: before a column-split layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class _Reduce(torch.autograd.Function):
    """All-reduce forward, identity backward: after a row-split layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _piece(weight: Tensor, dim: int) -> nn.Parameter:
    rank, size = dist.get_rank(), dist.get_world_size()
    return nn.Parameter(weight.detach().chunk(size, dim)[rank].clone())


def _columns(layer: nn.Linear) -> None:
    layer.weight = _piece(layer.weight, 0)
    if layer.bias is not None:
        layer.bias = _piece(layer.bias, 0)


def _rows(layer: nn.Linear) -> None:
    layer.weight = _piece(layer.weight, 1)


def _row_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    y = _Reduce.apply(F.linear(x, layer.weight))
    return y if layer.bias is None else y + layer.bias


class HandMLP(nn.Module):
    """The seed MLP: first layer by columns, second by rows, third whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layers = model.layers
        _columns(self.layers[0])
        _rows(self.layers[1])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = torch.relu(self.layers[0](x))
        x = torch.relu(_row_forward(self.layers[1], x))
        return F.cross_entropy(self.layers[2](x), target)


class HandFeedforward(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.up, self.down = model.up, model.down
        _columns(self.up)
        _rows(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return _row_forward(self.down, torch.relu(self.up(x))).square().mean()


class HandGPT(nn.Module):
    """The GPT: q, k, v and up by columns, proj and down by rows; two all-reduces a block forward, two backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for block in model.blocks:
            attention = block.attention
            for layer in (attention.q, attention.k, attention.v, block.up):
                _columns(layer)
            _rows(attention.proj)
            _rows(block.down)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        model = self.model
        x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        for block in model.blocks:
            x = x + self._attention(block.attention, _Copy.apply(block.ln1(x)))
            x = x + _row_forward(block.down, F.gelu(block.up(_Copy.apply(block.ln2(x)))))
        return F.cross_entropy(model.head(model.ln(x)).flatten(0, 1), target.flatten())

    def _attention(self, attention: nn.Module, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, attention.head).transpose(1, 2) for f in (attention.q, attention.k, attention.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return _row_forward(attention.proj, y.transpose(1, 2).reshape(b, s, -1))
