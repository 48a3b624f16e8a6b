"""Encoders of torch in evaluation: its fast path puts zeros where batches are padded, and masks of numbers are booleans."""

import copy

import pytest
import torch
from torch import nn

import shardwright as sw

torch.manual_seed(0)
WIDTH, LENGTH = 8, 5


def layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)


def paddings():
    """Padding at the ends, one within, as numbers, that are no minus infinity too, and of a whole row."""
    ends = torch.zeros(6, LENGTH, dtype=torch.bool)
    ends[1, 3:] = ends[3, 1:] = True
    within = ends.clone()
    within[4, 1] = True
    row = ends.clone()
    row[2] = True
    numbers = torch.zeros(6, LENGTH).double().masked_fill(ends, -0.5)
    return {"ends": ends, "within": within, "row": row, "numbers": numbers, "none": torch.zeros_like(ends)}


def masks():
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH).double()
    return {"causal": causal, "causal bool": causal != 0, "numbers": torch.randn(LENGTH, LENGTH).double().tril(-1)}


MODELS = {
    "encoder": lambda: nn.TransformerEncoder(layer(), 1),
    "with a norm": lambda: nn.TransformerEncoder(layer(norm_first=False), 2, norm=nn.LayerNorm(WIDTH)),
    "unchecked": lambda: nn.TransformerEncoder(layer(), 1, mask_check=False),
    "norm first": lambda: nn.TransformerEncoder(layer(norm_first=True), 1, enable_nested_tensor=False),
    "frozen": lambda: nn.TransformerEncoder(layer(), 1).requires_grad_(False),
}
PADDED = {
    "encoder": ["ends", "within", "row", "numbers", "none"],
    "with a norm": ["ends", "row"],
    "unchecked": ["ends", "within"],
    "norm first": ["row", "numbers"],
    "frozen": ["ends"],
}
CASES = [
    *((model, {"src_key_padding_mask": padding}) for model, chosen in PADDED.items() for padding in chosen),
    *(("encoder", {"mask": mask}) for mask in ("causal", "causal bool", "numbers")),
    ("norm first", {"mask": "numbers"}),
    ("encoder", {"mask": "causal bool", "src_key_padding_mask": "row"}),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("model, chosen", CASES, ids=str)
def test_values_are_those_of_torch(model, chosen, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=4)
    given = {name: {"mask": masks, "src_key_padding_mask": paddings}[name]()[which] for name, which in chosen.items()}
    single = MODELS[model]().double().eval()
    net, x = sw.AutoParallel(copy.deepcopy(single), "data_parallel"), torch.randn(6, LENGTH, WIDTH).double()
    with torch.set_grad_enabled(model == "frozen"):
        expected, found = single(x, **given), net(x, **given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, equal_nan=True)
