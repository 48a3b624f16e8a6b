"""``shardwright checkpoint``: looks into checkpoints, verifies them, and writes them in other slices and formats."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwright.checkpoint.export import size_of, to_dcp, to_huggingface, to_torch
from shardwright.checkpoint.rewrite import Cut, cut_as, cut_evenly, rewrite, verify_source
from shardwright.checkpoint.source import Source, as_ours, find_source, open_source
from shardwright.checkpoint.strategy_files import open_rank_folders, read_strategy_file, write_rank_folders
from shardwright.cli.options import _count, _printed, _UsageError
from shardwright.errors import CheckpointError, ShardwrightError, listed
from shardwright.plan.file.read import load_plan_file

CHECKPOINT_HELP = """\
Look into checkpoints, verify them, and write them in other slices and formats, without a model and without ranks.

A checkpoint is a folder of sw.save or that of one step, a folder of Hugging Face weights, or one of
torch.distributed.checkpoint. It may be larger than memory. Nothing that is in it is run."""
CHECKPOINT_EXAMPLES = """\
examples:
  shardwright checkpoint inspect run
  shardwright checkpoint verify run --step 300
  shardwright checkpoint transform run run-on-6 --ranks 6
  shardwright checkpoint transform run sliced --strategy strategy.json
  shardwright checkpoint merge run whole
  shardwright checkpoint export run weights --to huggingface --dtype bfloat16"""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    parser = commands.add_parser(
        "checkpoint", help="inspect, verify, transform, merge and export checkpoints", description=CHECKPOINT_HELP,
        epilog=CHECKPOINT_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=type(parser))
    helps = {
        "inspect": (_inspect, "print what a checkpoint holds"),
        "verify": (_verify, "compare every byte with its checksum"),
        "transform": (_transform, "write it in the slices of another number of ranks, plan or strategy file"),
        "merge": (_merge, "write it with every tensor whole, in one file"),
        "export": (_export, "write the model for others"),
    }
    made = {}
    for name, (action, text) in helps.items():
        made[name] = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made[name].set_defaults(command=_told(action), name=f"checkpoint {name}")
        made[name].add_argument("folder", type=Path, help="the checkpoint")
        made[name].add_argument("--step", type=int, metavar="N", help="which step; default: the newest")
        made[name].add_argument(
            "--source-strategy", type=Path, metavar="FILE",
            help="the strategy file (JSON) of a checkpoint with a folder rank_<n> for each rank",
        )  # fmt: skip
    for name in ("transform", "merge", "export"):
        made[name].add_argument("target", type=Path, help="where to write")
    cut = made["transform"].add_mutually_exclusive_group(required=True)
    cut.add_argument("--ranks", type=_count, metavar="N", help="cut dim 0 of every tensor into N pieces")
    cut.add_argument("--plan", metavar="FILE", help="cut parameters and their states as a plan file has them")
    cut.add_argument("--strategy", type=Path, metavar="FILE", help="write a folder rank_<n> for each rank of a strategy file")
    made["transform"].add_argument("--prefix", default="checkpoint", help="of the files in folders of ranks")
    own = made["export"]
    own.add_argument("--to", choices=["huggingface", "dcp", "torch"], required=True, help="the format")
    own.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], help="convert floating tensors to it")
    own.add_argument("--shard", type=_size, default="5GB", metavar="SIZE", help="the most of a Hugging Face file; default: 5GB")


def _told(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Makes an action tell what was wrong in one clear text."""

    def told(arguments: argparse.Namespace) -> int:
        try:
            return action(arguments)
        except (ShardwrightError, OSError) as error:
            raise _UsageError(str(error)) from None

    return told


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]B)?", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB")
    return int(match[1]) * _UNITS[match[2] or ""]


def _opened(arguments: argparse.Namespace) -> Source:
    if arguments.source_strategy is not None:
        return as_ours(open_rank_folders(arguments.folder, read_strategy_file(arguments.source_strategy)))
    if not arguments.folder.is_dir():
        raise CheckpointError(f"there is no folder {arguments.folder}")
    return as_ours(open_source(find_source(arguments.folder, arguments.step)))


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.table import Table  # here: importing it draws from Python's random generator

    source = _opened(arguments)
    table = Table(box=None, pad_edge=False)
    for title in ("tensor", "shape", "dtype"):
        table.add_column(title)
    for title in ("slices", "bytes"):
        table.add_column(title, justify="right")
    for name, tensor in source.index.tensors.items():
        table.add_row(name, str(list(tensor.shape)), tensor.dtype, str(len(tensor.slices)), f"{tensor.bytes:,}")
    files = {stored.file for tensor in source.index.tensors.values() for stored in tensor.slices}
    lines = [f"{source.path}: {source.format}, step {source.index.step}, {len(source.index.tensors)} tensors of "
             f"{size_of(source):,} bytes in {len(files)} files"]  # fmt: skip
    lines += [f"states: {', '.join(source.index.states)}"] if source.index.states else []
    lines += [f"tied: {a} is {b}" for a, b in source.index.aliases.items()]
    lines += [f"extra: {source.index.extra}"] if source.index.extra else []
    print("\n".join(lines), "", _printed(table), sep="\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    source = _opened(arguments)
    with _progress("verifying", size_of(source)) as advance:
        problems = verify_source(source, advance)
    if problems:
        print("\n".join([f"{source.path}: {len(problems)} of {len(source.index.tensors)} tensors are damaged", *problems]))
        return 1
    what = "are as they were written" if source.reader.has_checksums else "are there; this format has no checksums"
    print(f"{source.path}: {len(source.index.tensors)} tensors, {size_of(source):,} bytes {what}")
    return 0


def _transform(arguments: argparse.Namespace) -> int:
    source = _opened(arguments)
    _refuse_the_same(source, arguments.target)
    with _progress("transforming", 2 * size_of(source)) as advance:
        if arguments.strategy is not None:
            strategy = read_strategy_file(arguments.strategy)
            write_rank_folders(source, arguments.target, strategy, advance, arguments.prefix)
            print(f"written to {arguments.target}")
            return 0
        cut = cut_evenly(arguments.ranks) if arguments.ranks else _cut_of_plan(arguments.plan, source)
        path = rewrite(source, arguments.target, cut, advance)
    print(f"written to {path}")
    return 0


def _cut_of_plan(path: str, source: Source) -> Cut:
    """Returns the cut of a plan file's parameters, which must be the checkpoint's."""
    plan = load_plan_file(path)
    problems = [
        f"{name}: {list(entry.shape)} in the plan and {list(there.shape)} in the checkpoint"
        for name, entry in plan.parameters.items()
        if (there := source.index.tensors.get(f"model.{name}")) is not None and entry.shape not in (None, there.shape)
    ]
    known = [name for name in plan.parameters if f"model.{name}" in {*source.index.tensors, *source.index.aliases}]
    if plan.parameters and not known:
        problems.append(f"the checkpoint has no parameter of the plan, such as {next(iter(plan.parameters))}")
    if problems:
        raise CheckpointError(listed(f"{path} does not fit {source.path}", problems), tuple(problems))

    def of(entry: Any) -> Callable[[tuple[int, ...]], list[Any]]:
        def bounds(shape: tuple[int, ...]) -> list[Any]:
            if len(shape) != entry.layout.ndim or (entry.shape is not None and shape != entry.shape):
                return []
            by_rank = entry.layout.bounds(shape)
            return [by_rank.get(rank) for rank in range(plan.devices)]

        return bounds

    return cut_as({name: of(entry) for name, entry in plan.parameters.items()}, plan.devices)


def _merge(arguments: argparse.Namespace) -> int:
    source = _opened(arguments)
    _refuse_the_same(source, arguments.target)
    with _progress("merging", 2 * size_of(source)) as advance:
        path = rewrite(source, arguments.target, cut_evenly(1), advance)
    print(f"written to {path}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    source, target = _opened(arguments), arguments.target
    _refuse_the_same(source, target)
    with _progress("exporting", 2 * size_of(source)) as advance:
        if arguments.to == "huggingface":
            to_huggingface(source, target, advance, arguments.shard, arguments.dtype)
        elif arguments.to == "dcp":
            to_dcp(source, target, advance, arguments.dtype)
        else:
            to_torch(source, target, advance, arguments.dtype)
    print(f"written to {target}")
    return 0


def _refuse_the_same(source: Source, target: Path) -> None:
    if target.resolve() in (source.path.resolve(), source.path.parent.resolve()):
        raise _UsageError(f"{target} is the checkpoint itself: name another folder to write to")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how much is done, on the standard error, and yields what is told bytes."""
    from rich.console import Console  # here: importing it draws from Python's random generator
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=max(total, 1))
        yield lambda size: progress.advance(task, size)
