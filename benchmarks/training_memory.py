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

Towards the end activations are gone and gradients are there, of the last layers first. They travel in buckets: parameters in
the order in which they are read, filled from the last; one that fills a bucket is alone. What several share is packed: of a
bucket of ``g`` bytes there are at most ``2 g``, the gradients and what travels; one alone is summed where it is, ``g``.
Optimizer parallelism adds whole parameters: under ``level1`` those of all buckets that the backward has not come by yet (what
reads the model's input needs no weight for its backward); under ``level3`` those of the bucket in use, and the one before it,
which is on its way: its pieces, packed, and room for the whole. When a bucket's gradients are complete its parameters are
there too if it is one alone, ``2 g``, and else all gone but the last, while gradients are packed, ``2 g`` as well.

What arrives to be added waits in memory that stays for the next time: of a sum of ``g`` bytes over ``n`` ranks ``g / n`` each
from ``n - 1`` ranks, but no more at once than two parts of 6 MB in all. Small sums (1 MB on two ranks, 2 MB on more) go through
one rank, which takes ``(n - 1) g``; gloo's own sum of two, for large ones, needs none of ours.

The peak is the highest of: the loss, the first GELU, and every gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from memory_truth import _MARK, peak_between_marks, train
from models import GPT
from torch import Tensor, nn
from training_variants import BUCKET, CASES, OURS, adamw, batch, own_inputs, prepared, threshold

from shardwright.cost.message_sizes import AHEAD, LEAST_PART, PART
from shardwright.ir.buckets import MoveBuckets
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
    stored = {name: _stored(name, size, strategy, ranks, least) for name, size in sizes.items()}
    kept = _gpt(net, inputs, strategy, ranks, rows) if isinstance(net, GPT) else _mlp(net, strategy, ranks, rows)
    if split:
        moments = [SIZE * elements for elements in kept] + [sum(stored.values())]
        width = inputs[0].shape[1] * net.tokens.embedding_dim if isinstance(net, GPT) else net.layers[1].out_features
        arriving = _arriving(SIZE * rows * width, ranks, False) if strategy == "tensor parallel" else 0.0
    else:
        default = MoveBuckets()
        full = BUCKET << 20 if "fused" in strategy else (default.gathers if "hsdp" in strategy else default.sums).bytes
        buckets = _buckets({n: s for n, s in sizes.items() if "hsdp" not in strategy or s >= least}, full)
        moments = _while_buckets_travel(kept, buckets, strategy, ranks, full)
        arriving = max(_arriving(sum(bucket), ranks, "hsdp" in strategy) for bucket in buckets)
    return sum(t.nbytes for t in inputs) + 3 * sum(stored.values()) + arriving + max(moments)


def _while_buckets_travel(
    kept: tuple[float, ...], buckets: list[list[int]], strategy: str, ranks: int, full: int
) -> list[float]:
    """Bytes at the loss and at the first GELU, and when each bucket's gradients are complete, the last bucket first."""
    sizes = [float(sum(bucket)) for bucket in buckets]
    needed = [sizes[0] - buckets[0][0], *sizes[1:]]  # what reads the input has no use for its weight any more

    def on_its_way(number: int) -> float:
        return needed[number] * (1 + 1 / ranks) if number >= 0 and "level3" in strategy else 0.0

    whole = {"level1": sum(needed), "level3": sizes[-1]}.get(strategy.partition(",")[0].removeprefix("hsdp "), 0.0)
    moments = [SIZE * elements + whole + on_its_way(len(sizes) - 2) for elements in kept]
    done = 0.0
    for number in reversed(range(len(sizes))):
        before = sum(needed[:number]) if "level1" in strategy else on_its_way(number - 1)
        is_in_place = "hsdp" not in strategy and sizes[number] >= full
        moments.append(done + before + sizes[number] * (1 if is_in_place else 2))
        done += sizes[number] / (ranks if "hsdp" in strategy else 1)
    return moments


def _buckets(sizes: dict[str, int], full: int) -> list[list[int]]:
    """Bytes of parameters in buckets, in the order in which they are read."""
    found: list[list[int]] = [[]]
    for size in reversed(sizes.values()):
        if size >= full:
            found[:0] = [[], [size]] if found[0] else [[size]]
        else:
            shared = next((bucket for bucket in found if sum(bucket) < full), None)
            if shared is None:
                found.insert(0, shared := [])
            shared.insert(0, size)
    return [bucket for bucket in found if bucket]


def _arriving(size: float, ranks: int, is_scattered: bool) -> float:
    """Bytes of what the others send to be added to ours."""
    if size <= ((1 if ranks == 2 else 2) << 20) and not is_scattered:
        return (ranks - 1) * size
    if ranks == 2 and not is_scattered:
        return 0.0
    piece, most = size / ranks, max(LEAST_PART, PART / (ranks - 1))
    parts = math.ceil(piece / most)
    return (ranks - 1) * piece / parts * min(AHEAD, parts)


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
