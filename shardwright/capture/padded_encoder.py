"""Padded encoder: what ``nn.TransformerEncoder`` and its layers compute of masked batches in evaluation.

Where no gradient is wanted, torch takes a fast path, by kernels and nested tensors that a graph cannot hold, and that differ
from its operators in three ways: the encoder leaves out padded positions and puts zeros there; layers take a mask of numbers
for one of what is not zero; and rows that may see nothing are NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_plain_forward, _plain_layer = nn.TransformerEncoder.forward, nn.TransformerEncoderLayer.forward


def encoder_forward(
    encoder: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Replaces the forward of ``nn.TransformerEncoder`` in a capture.

    Args:
        encoder: the module.
        src, mask, src_key_padding_mask, is_causal: as for torch's.
    """
    if src_key_padding_mask is None or mask is not None or not _leaves_out_padding(encoder, src):
        return _plain_forward(encoder, src, mask, src_key_padding_mask, is_causal)  # type: ignore[arg-type]
    adds = src_key_padding_mask.is_floating_point()
    padded = src_key_padding_mask != 0 if adds else src_key_padding_mask
    positions = torch.arange(padded.shape[1], device=padded.device)
    behind = positions >= padded.logical_not().sum(1, keepdim=True)
    if getattr(encoder, "mask_check", True):  # only where all rows of the batch have their padding at the end
        behind = behind & (behind == padded).all()
        given = src_key_padding_mask if adds else torch.zeros(padded.shape, dtype=src.dtype).masked_fill(padded, -torch.inf)
    else:
        given = torch.zeros(padded.shape, dtype=src.dtype)
    seen = given.to(src.dtype).masked_fill(behind, -torch.inf)
    output = src
    for layer in encoder.layers:
        output = layer(output, src_key_padding_mask=seen)
    output = output.masked_fill(behind[:, :, None], 0.0)
    return output if encoder.norm is None else encoder.norm(output)  # type: ignore[no-any-return]


def _leaves_out_padding(encoder: Any, src: Tensor) -> bool:
    """Tells whether torch would compute without the padded positions, by the conditions of ``nn.TransformerEncoder``."""
    if not torch.backends.mha.get_fastpath_enabled() or not getattr(encoder, "use_nested_tensor", False):
        return False
    return _without_gradients(encoder.layers[0], src)


def _without_gradients(layer: Any, src: Tensor) -> bool:
    if layer.training or src.dim() != 3 or torch.is_autocast_enabled():
        return False
    if not torch.is_grad_enabled():
        return True
    attention = layer.self_attn
    parts = (attention.out_proj, layer.norm1, layer.norm2, layer.linear1, layer.linear2)
    weights = [src, attention.in_proj_weight, attention.in_proj_bias, *(t for part in parts for t in (part.weight, part.bias))]
    return not any(t is not None and t.requires_grad for t in weights)


def layer_forward(
    layer: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Replaces the forward of ``nn.TransformerEncoderLayer`` in a capture.

    Args:
        layer: the module.
        src, src_mask, src_key_padding_mask, is_causal: as for torch's.
    """
    if (src_mask is None and src_key_padding_mask is None) or not _is_fast(layer, src):
        return _plain_layer(layer, src, src_mask, src_key_padding_mask, is_causal)
    mask, padding = (m if m is None or m.dtype == torch.bool else m != 0 for m in (src_mask, src_key_padding_mask))
    output = _plain_layer(layer, src, mask, padding)
    blind = torch.zeros((), dtype=torch.bool, device=src.device)
    if mask is not None:
        blind = blind | (mask if mask.dim() == 2 else mask.unflatten(0, (src.shape[0], -1)))
    if padding is not None:
        blind = blind | (padding[:, None, :] if mask is None or mask.dim() == 2 else padding[:, None, None, :])
    blind = blind.all(-1)  # of the keys
    blind = blind.any(1) if blind.dim() == 3 else blind
    return output.masked_fill(blind[..., None], torch.nan)


def _is_fast(layer: Any, src: Tensor) -> bool:
    """Tells whether torch would take its fast path, by the conditions of ``nn.TransformerEncoderLayer``."""
    attention = layer.self_attn
    if not (torch.backends.mha.get_fastpath_enabled() and attention.batch_first and attention._qkv_same_embed_dim):
        return False
    if attention.in_proj_bias is None or not layer.activation_relu_or_gelu or attention.num_heads % 2:
        return False
    if layer.norm1.eps != layer.norm2.eps or any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()):
        return False
    return _without_gradients(layer, src)
