"""What ``training.py`` found, as tables, and the targets that were missed.

All ratios are of medians; the spread is that of the ratios turn by turn, from the first quartile to the third.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_variants import BUCKET, OURS, SINGLE, variants

Found = Mapping[str, Any]

# What is compared: ours, the peers of which the fastest counts, and how many times as fast as it ours must be at least.
SAME = 0.97
PAIRS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("data parallel", ("DDP",), SAME),
    ("hsdp level3", ("FSDP2",), SAME),
    ("hsdp level1", ("FSDP2, kept",), SAME),
    ("tensor parallel", ("DTensor", "hand-written"), SAME),
)
COMMUNICATION_BOUND: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("auto", ("DDP",), 1.3),
    ("auto", ("FSDP2", "FSDP2, kept"), 1.5),
)
CLOSED_FORM, PREDICTED, LOSS = 0.10, 0.05, 1e-4
UNSEEN = 0.01  # share of the peak that may have been freed where the profiler does not look
# All-reduces of a step of the GPT under tensor parallelism, a layer: ours, and what DTensor's plan makes of the same split.
ALL_REDUCES, OF_DTENSOR = 4, 6

_KINDS = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS", "all_to_all": "A2A", "broadcast": "B"}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a peer ours is.

    Args:
        low, high: quartiles of the ratios of the turns that both took.
        least: the target.
    """

    ours: str
    peer: str
    value: float
    low: float
    high: float
    least: float

    @property
    def names(self) -> tuple[str, str]:
        return self.ours, self.peer

    @property
    def missed(self) -> bool:
        return self.value < self.least

    def __str__(self) -> str:
        spread = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.ours} is {self.value:.2f} times as fast as {self.peer} ({spread}), not {self.least}"


def ratios(case: str, found: Found) -> list[Ratio]:
    """Ours against the fastest of the peers that each is compared with."""
    result = []
    for ours, peers, least in PAIRS + (COMMUNICATION_BOUND if "wide" in case else ()):
        timed = {peer: found[peer]["seconds"] for peer in peers if "seconds" in found.get(peer, {})}
        if timed and "seconds" in found.get(ours, {}):
            peer = min(timed, key=lambda name: timed[name])
            low, high = _quartiles(found[ours], found[peer])
            result.append(Ratio(ours, peer, timed[peer] / found[ours]["seconds"], low, high, least))
    return result


def _quartiles(ours: Found, peer: Found) -> tuple[float, float]:
    theirs = dict(zip(peer["turns"], peer["times"]))
    each = [theirs[turn] / seconds for turn, seconds in zip(ours["turns"], ours["times"]) if turn in theirs]
    low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return low, high


# -- targets ---------------------------------------------------------------------------------------------------------------


def missed_targets(results: Mapping[int, Found]) -> list[str]:
    """A line a target that was missed."""
    found = []
    for ranks, cases in results.items():
        for case, each in cases.items():
            lines = [*map(str, (r for r in ratios(case, each) if r.missed)), *_other_losses(each)]
            lines += [*_too_many(case, each), *_memory_off(each)]
            found += [f"{case} on {ranks}: {line}" for line in lines]
    return found


def _other_losses(found: Found) -> Iterator[str]:
    expected = found.get(SINGLE, {}).get("losses", ())
    for name, each in found.items():
        for step, (got, wanted) in enumerate(zip(each.get("losses", ()), expected), 1):
            if not abs(got - wanted) <= LOSS * abs(wanted):
                yield f"{name} has the loss {got:.6f} at step {step}, the single device {wanted:.6f}"
                break


def _too_many(case: str, found: Found) -> Iterator[str]:
    """Collectives: fused ones against their bytes, those of tensor parallelism against Megatron's."""
    for name in ("data parallel, fused", "hsdp level1, fused"):
        for kind, (count, size) in found.get(name, {}).get("of_parameters", {}).items():
            allowed = math.ceil(size / (BUCKET << 20)) + 1
            if kind in fused_kinds(name) and count > allowed:
                yield f"{name} launches {count} of {kind} for {size / 1e6:.1f} MB, not {allowed}"
    counts = found.get("tensor parallel", {}).get("counts", {})
    layers = gpt_layers(case)
    if layers and counts and counts != {"all_reduce": ALL_REDUCES * layers}:
        yield f"tensor parallel makes {counts}, not {ALL_REDUCES * layers} all-reduces"


def fused_kinds(name: str) -> tuple[str, ...]:
    """Kinds of collectives that a variant says the size of."""
    return ("all_gather", "reduce_scatter") if "hsdp" in name else ("all_reduce",)


def gpt_layers(case: str) -> int:
    return {"gpt": 4, "tiny gpt": 2}.get(case, 0)


def _memory_off(found: Found) -> Iterator[str]:
    for name, each in found.items():
        for key, limit in (("closed", CLOSED_FORM), ("predicted", PREDICTED)):
            if key in each and abs(each[key] / each["peak"] - 1) > limit:
                what = "closed form" if key == "closed" else "prediction"
                off = each[key] / each["peak"] - 1
                yield f"{name} needs {each['peak'] / 1e6:.1f} MB, the {what} is {each[key] / 1e6:.1f} MB ({off:+.0%})"


# -- tables ----------------------------------------------------------------------------------------------------------------


def tables(results: Mapping[int, Found]) -> str:
    """A table a case and number of ranks, and one of the ratios."""
    parts = []
    for ranks, cases in results.items():
        for case, found in cases.items():
            parts.append(f"{case}, {ranks} ranks:\n\n{_table(case, found)}")
    return "\n\n".join([*parts, "Ours against the fastest peer of the same strategy:\n\n" + _ratio_table(results)])


def _table(case: str, found: Found) -> str:
    head = ["", "step", "collectives", "sent", "peak memory", "closed form", "predicted"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in variants(case):
        if name not in found:
            continue
        each = found[name]
        kinds = ", ".join(f"{n} {_KINDS.get(kind, kind)}" for kind, n in sorted(each.get("counts", {}).items()))
        cells = [f"**{name}**" if name in OURS else name, _of(each, "seconds", 1e3, "ms"), kinds or "none"]
        unseen = "≤ " if each.get("left", 0) > UNSEEN * each.get("peak", 0) else ""
        cells += [_of(each, "bytes", 1e-6, "MB"), unseen + _of(each, "peak", 1e-6, "MB")]
        cells += [_against(each, key) for key in ("closed", "predicted")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(each: Found, key: str, factor: float, unit: str) -> str:
    return f"{each[key] * factor:.1f} {unit}" if key in each else ""


def _against(each: Found, key: str) -> str:
    return f"{each[key] / 1e6:.1f} MB ({each[key] / each['peak'] - 1:+.1%})" if key in each else ""


def _ratio_table(results: Mapping[int, Found]) -> str:
    lines = ["| model | ranks | ours | fastest peer | times as fast | turn by turn | target |", "|---" * 7 + "|"]
    for ranks, cases in results.items():
        for case, found in cases.items():
            lines += [
                f"| {case} | {ranks} | {r.ours} | {r.peer} | {r.value:.2f} | {r.low:.2f} to {r.high:.2f} | {r.least} |"
                for r in ratios(case, found)
            ]
    return "\n".join(lines)


def write_between_marks(page: Path, text: str, mark: str = "<!-- training -->") -> None:
    """Replaces what stands between two marks of a page."""
    before, found, rest = page.read_text("utf-8").partition(mark)
    _, closed, after = rest.partition(mark)
    if not (found and closed):
        raise SystemExit(f"{page} lacks two marks {mark}")
    page.write_text(f"{before}{mark}\n\n{text}\n\n{mark}{after}", "utf-8")
