"""Draws a timeline as a picture, or writes it as a trace for a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import BACKWARD, FORWARD, INPUT, REDUCE_GRAD, UNSHARD, WEIGHT
from shardwright.pipeline.schedules.clock import Event, Timeline

SUFFIXES = (".png", ".svg")
COLOURS = {
    FORWARD: "#9ec5e8", BACKWARD: "#a8d5a2", INPUT: "#f2c98a", WEIGHT: "#d8c3e6", UNSHARD: "#c9c9c9", REDUCE_GRAD: "#e39b97",
}  # fmt: skip
WORDS = {FORWARD: "forward", BACKWARD: "backward", INPUT: "gradients of inputs", WEIGHT: "gradients of weights"}
WORDS |= {UNSHARD: "gathers of parameters", REDUCE_GRAD: "sums of gradients over ranks"}
INK, EDGE = "#222222", "#555555"
ACROSS = 11.0  # inches that the timeline has
LABELLED = 3000  # events; of more no text can be read


def draw_timeline(timeline: Timeline, path: str | Path) -> None:
    """Draws a row for each rank, and each action as a box as long as it takes.

    Args:
        timeline: what :func:`run_clock` returned.
        path: where to write; the suffix is ``.png`` or ``.svg``.

    Raises:
        PipelineError: the file has no suffix of a picture.
        ImportError: matplotlib is missing; the extra ``draw`` brings it.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PipelineError(f"cannot draw a {Path(path).suffix or 'file without a suffix'}: name a .png or .svg file")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'shardwright[draw]'") from error

    # Text stays text in an SVG, and the same timeline gives the same file.
    rc: Any = matplotlib.rc_context
    with rc({"svg.fonttype": "none", "svg.hashsalt": "shardwright", "font.size": 9}):
        ranks = len(timeline.schedule.rows)
        figure = Figure(figsize=(ACROSS + 1, 1.3 + 0.4 * ranks), layout=ConstrainedLayoutEngine())
        _draw(figure.subplots(), timeline, ranks)
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw(axes: Any, timeline: Timeline, ranks: int) -> None:
    from matplotlib.patches import Patch

    work = [event for event in timeline.events if event.action.kind in COLOURS and event.end > event.start]
    for rank in range(ranks):
        row = [event for event in work if event.rank == rank]
        boxes = [(event.start, event.end - event.start) for event in row]
        axes.broken_barh(
            boxes,
            (rank - 0.45, 0.9),
            facecolors=[COLOURS[event.action.kind] for event in row],
            edgecolor="white",
            linewidth=0.7,
        )
    points = 72 * ACROSS / (timeline.seconds or 1.0)
    for event in work if len(work) <= LABELLED else ():
        text, size = str(event.action), 7
        if 0.62 * size * len(text) > (event.end - event.start) * points:
            text, size = "" if event.action.micro is None else str(event.action.micro), 6
        if 0.62 * size * len(text) <= (event.end - event.start) * points:
            middle = (event.start + event.end) / 2
            axes.text(middle, event.rank, text, ha="center", va="center", fontsize=size, color=INK)
    axes.set_xlim(0, timeline.seconds or 1.0)
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel("seconds", color=INK)
    axes.tick_params(labelsize=8, colors=EDGE, length=3)
    axes.set_title(
        f"{timeline.schedule.name}: {timeline.seconds:.6g} seconds, ranks idle {timeline.bubble:.1%} of them",
        fontsize=11,
        color=INK,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    kinds = [kind for kind in COLOURS if any(event.action.kind == kind for event in work)]
    handles = [Patch(facecolor=COLOURS[kind], label=f"{kind}: {WORDS[kind]}") for kind in kinds]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.3 if ranks < 4 else -0.16), ncols=4, frameon=False)


def write_trace(timeline: Timeline, path: str | Path) -> None:
    """Writes a trace in Chrome's JSON, a thread for each rank, for ``chrome://tracing`` or Perfetto."""
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(timeline.schedule.rows))
    ]
    title = {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": timeline.schedule.name}}
    events = [_trace_event(event) for event in timeline.events]
    Path(path).write_text(json.dumps({"traceEvents": [title, *names, *events], "displayTimeUnit": "ms"}), encoding="utf-8")


def _trace_event(event: Event) -> dict[str, Any]:
    return {
        "name": str(event.action),
        "cat": event.action.kind,
        "ph": "X",
        "ts": event.start * 1e6,  # microseconds
        "dur": (event.end - event.start) * 1e6,
        "pid": 0,
        "tid": event.rank,
        "args": {"stage": event.action.stage, "micro-batch": event.action.micro},
    }
