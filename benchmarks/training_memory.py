"""Peak memory of a training step per rank: measured, predicted by the planner, and in closed form.

*Measured*: three steps under torch's profiler, the most in use over the last two (the method of ``memory_truth.py``).

*Closed form*: let a rank store ``p`` bytes of parameters; AdamW keeps twice as many, and every parameter has a gradient of
its size, so a step ends with ``4 p``. In the forward there are no gradients but what the backward will read. With
``t`` rows (tokens) on the rank, in elements:

- A block of the GPT keeps, of width ``d`` and ``h`` heads: the two tensors that its norms read and what they make of them
  (``4 d`` a token), the means and deviations of both (``4``), and within Megatron's split q, k, v and the result of
  attention (``4 d``), its logarithms of sums (``h``), what goes into the GELU and comes out (``8 d``). The four ``d`` are
  whole on every rank under tensor parallelism; under sequence parallelism what the norms read is split too, and what they
  make is gathered.
- At the loss over a vocabulary of ``v`` there are besides: input and result of the last norm (``2 d``), the logarithms of
  the probabilities, and two gradients of them (``3 v``).
- At the last block's GELU, the first to go backward: the gradient of the block's result (``d``), of what came out of the
  GELU (``4 d``, split) and those of the parameters up to there.
- A layer of the MLP keeps its result after the ReLU.

Towards the end activations are gone and gradients are there, of the last layers first. A gradient ``g`` that is being
summed is there besides its sum, ``2 g`` in all. Optimizer parallelism adds the whole parameters where the strategy has them:
under ``level1`` all that the backward has not come by yet, under ``level3`` one. A gradient is made while its parameter is
there whole, ``2 g``; when that is gone and it is scattered over ``n`` ranks, it is there besides the pieces that come from
the others and their sum, ``g + (n - 1) g / n + g / n``, which is as much.

The peak is the highest of: the loss, the first GELU, and every gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from memory_truth import _MARK, peak_between_marks, train
from models import GPT
from torch import Tensor, nn
from training_variants import CASES, OURS, adamw, batch, own_inputs, prepared, threshold

from shardwright.plan.memory import memory_of

SIZE = 4  # bytes of an element


def measure(name: str, case: str, world: Any) -> dict[str, Any]:
    """Peak memory of one variant: of all ranks; and for ours what was predicted."""
    found: dict[str, Any] = {}

    def predict(call: Any) -> None:
        if name in OURS:
            timeline = memory_of(call.plan, "fused adamw")
            found.update(predicted=timeline.peak, at=timeline.at)

    plain_all_reduce = dist.all_reduce
    dist.all_reduce = _rested(plain_all_reduce)
    try:
        events = train(
            lambda: prepared(name, case, world.size), lambda: own_inputs(name, case, world.size), adamw, predict, world
        )
    finally:
        dist.all_reduce = plain_all_reduce
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, (peak_between_marks(events), left_between_marks(events)))
    if name in OURS and name != "auto":
        found["closed"] = closed_form(CASES[case][0](), batch(case), name, world.size)
    return found | {"peak": max(peak for peak, _ in everyone), "left": max(left for _, left in everyone)}


def left_between_marks(events: list[tuple[int, int]]) -> int:
    """Bytes that two steps seem to have left behind: freed by threads that the profiler does not see."""
    marks = [place for place, (_, size) in enumerate(events) if size == _MARK]
    return sum(size for _, size in events[marks[0] : marks[1]] if abs(size) != _MARK)


def _rested(call: Callable[..., Any]) -> Callable[..., Any]:
    """Gives gloo's threads time to let go of tensors, so that this thread is seen to free them."""

    def rested(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        time.sleep(0.002)
        return result

    return rested


# -- closed form -----------------------------------------------------------------------------------------------------------


def closed_form(net: nn.Module, inputs: tuple[Tensor, ...], strategy: str, ranks: int) -> float:
    """Bytes at the peak, as the docstring of this file derives.

    Args:
        net: the model as it is written, for a single device.
        inputs: the whole batch.
        strategy: one of ours, but ``auto``.
    """
    split = strategy in ("tensor parallel", "sequence parallel")
    rows = inputs[0].shape[0] if split else inputs[0].shape[0] // ranks
    sizes = {name: p.nbytes for name, p in net.named_parameters()}
    least = threshold(net) << 10
    stored = sum(_stored(name, size, strategy, ranks, least) for name, size in sizes.items())
    given = sum(t.nbytes for t in inputs)
    whole = {name: size for name, size in sizes.items() if "hsdp" in strategy and size >= least}
    gathered = float(sum(whole.values()) if "level1" in strategy else max(whole.values(), default=0))
    kept = _gpt(net, inputs, strategy, ranks, rows) if isinstance(net, GPT) else _mlp(net, strategy, ranks, rows)
    moments = [SIZE * elements + gathered for elements in kept]
    done, held = 0.0, gathered
    for name, size in reversed(sizes.items()):
        piece = _stored(name, size, strategy, ranks, least)
        held = held if "level1" in strategy else whole.get(name, 0)
        moments.append(done + held + (piece if split else size if name in whole else 2 * size))
        done += piece
        held -= whole.get(name, 0)
    return given + 3 * stored + max(moments)


def _stored(name: str, size: int, strategy: str, ranks: int, least: int) -> float:
    """Bytes of a parameter on a rank; optimizer parallelism splits those of so many bytes."""
    if "hsdp" in strategy:
        return size / ranks if size >= least else size
    if strategy not in ("tensor parallel", "sequence parallel"):
        return size
    columns = ("attention.q.", "attention.k.", "attention.v.", "up.", "layers.0.")
    rows = ("attention.proj.weight", "down.weight", "layers.1.weight")
    return size / ranks if any(part in name for part in (*columns, *rows)) else size


def _gpt(net: Any, inputs: tuple[Tensor, ...], strategy: str, ranks: int, rows: int) -> tuple[float, ...]:
    """Elements besides what the rank stores: at the loss, and at the first GELU to go backward."""
    d, vocabulary = net.tokens.embedding_dim, net.tokens.num_embeddings
    heads = d // net.blocks[0].attention.head
    tensor = ranks if strategy in ("tensor parallel", "sequence parallel") else 1
    sequence = ranks if strategy == "sequence parallel" else 1
    t = rows * inputs[0].shape[1]
    block = t * ((2 * d + 4) / sequence + 2 * d + (12 * d + heads) / tensor)
    kept = len(net.blocks) * block
    head = d * vocabulary
    at_loss = kept + t * (2 * d + 3 * vocabulary)
    at_gelu = kept + t * (d / sequence + 4 * d / tensor) + head + 4 * d * d / tensor
    return at_loss, at_gelu


def _mlp(net: Any, strategy: str, ranks: int, rows: int) -> tuple[float, ...]:
    widths = [layer.out_features for layer in net.layers]
    if strategy == "tensor parallel":
        widths[0] /= ranks
    return (rows * sum(widths),)
