"""Describes in words how the events of several ranks differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwright.agreement.signature import difference_of, differing_value

_STAGES = ("/graph", "/program")


def judge(messages: Sequence[dict[str, Any]]) -> str:
    """Judges the messages of all ranks: ``"="`` where they agree, ``"=1"`` where rank 1 shows another text, else words.

    >>> messages = [{"event": "call 1", "facts": {"input 0": f"float32 [{n}]"}, "new": True, "chain": 0} for n in (8, 6)]
    >>> judge(messages)[:58]
    "call 1: rank 1's input 0 is float32 [6], rank 0's float32 "
    """
    if "stage" in messages[0]:
        return _judge_made(messages)
    if "names" in messages[0]:
        return next(filter(None, (_other_weights(messages[0], its, rank) for rank, its in enumerate(messages))), "=")
    if "sketches" in messages[0]:
        return next(filter(None, (_other_data(messages[0], its, rank) for rank, its in enumerate(messages))), "=")
    here = messages[0]
    for rank, there in enumerate(messages):
        if there.get("past"):
            return f"rank {rank} is many calls ahead of the others: make the same calls on every rank"
        if there["facts"].get("net") != here["facts"].get("net") or there["event"] != here["event"]:
            return _other_event(here, there, rank)
        if there.get("every") != here.get("every"):
            said = f"check_weights={there.get('every')} on rank {rank} and {here.get('every')} on rank 0"
            return f"{here['event']}: sw.init was given {said}: give the same on every rank"
        differs = difference_of(here["facts"], 0, there["facts"], rank)
        if differs:
            return f"{here['event']}: {differs}; hand the same shapes and dtypes to the model in the same mode on every rank"
        if there["new"] != here["new"] or there["chain"] != here["chain"]:
            return _other_event(here, there, rank)
    values = [m.get("values") for m in messages]
    return "~" if None not in values and any(v != values[0] for v in values) else "="


def _judge_made(messages: Sequence[dict[str, Any]]) -> str:
    """Judges what ranks have made of a call: its graph or its program."""
    here = messages[0]
    for rank, there in enumerate(messages):
        if there["number"] != here["number"]:
            return f"={rank}"
        at = differing_value(here["sketches"], there["sketches"])
        if at is not None:
            return (
                f"{here['event']}: a tensor that the model reads as a constant, number {at}, holds other values on rank "
                f"{rank} than on rank 0: make it a buffer, or call torch.manual_seed with the same number on every rank"
            )
    return "="


def _other_event(here: dict[str, Any], there: dict[str, Any], rank: int) -> str:
    if there["event"] == here["event"]:
        what = "makes a new plan for" if there["new"] else "runs a plan it has for"
        if there["new"] != here["new"]:
            return f"{here['event']}: rank {rank} {what} it and rank 0 does not; make the same calls on every rank"
        past = "; ".join(f"rank {r}: {', '.join(m['before'])}" for r, m in ((0, here), (rank, there)))
        return f"{here['event']}: what the ranks did before differs ({past}); make the same calls on every rank"
    return f"rank {rank} is in {there['event']}, rank 0 in {here['event']}; make the same calls in the same order on all ranks"


def _other_data(here: dict[str, Any], there: dict[str, Any], rank: int) -> str:
    at = differing_value(here["sketches"], there["sketches"])
    if at is None:
        return ""
    return (
        f"{here['event']}: rank {rank}'s input {at} holds other values than rank 0's, and under the dataset strategy "
        "'full_batch' every rank is to hand in the whole batch, the same. If each rank reads its own part, as with "
        'DistributedSampler or Accelerate, say so: net.dataset_strategy("data_parallel"). With it, the Trainer of Hugging Face '
        "multiplies the loss by the number of ranks, unless trainer.model_accepts_loss_kwargs = False"
    )


def _other_weights(here: dict[str, Any], there: dict[str, Any], rank: int) -> str:
    at = differing_value(here["sketches"], there["sketches"], _DRIFT)
    if at is None:
        return ""
    return (
        f"{here['event']}: parameter {here['names'][at]} is another on rank {rank} than on rank 0, though both hold the whole: "
        "step the same optimizer, with the same learning rate, on the same loss, on every rank"
    )


_DRIFT = 1e-3  # relative to a weight's norm; rounding moves copies apart by less, even in many steps


def _first_difference(stage: str, here: Sequence[str], there: Sequence[str], other: int) -> str:
    for mine, its in zip(here, there, strict=False):
        if mine != its:
            return f"the ranks have other {stage}s: rank 0 has '{mine.strip()}' where rank {other} has '{its.strip()}'; {_SAME}"
    longer, rank = (here, 0) if len(here) > len(there) else (there, other)
    extra = longer[min(len(here), len(there))].strip()
    return f"the ranks have other {stage}s: rank {rank} goes on with '{extra}' where rank {other - rank} ends; {_SAME}"


_SAME = "build the same model, with the same settings, on every rank"
