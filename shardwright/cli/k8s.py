"""``shardwright k8s``: renders, checks and explains jobs on Kubernetes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.cli.options import _UsageError
from shardwright.errors import ShardwrightError
from shardwright.launch.kubernetes.dockerfile import dockerfile
from shardwright.launch.kubernetes.explain import explain
from shardwright.launch.kubernetes.job import Job
from shardwright.launch.kubernetes.msjob import KIND, read_msjob
from shardwright.launch.kubernetes.render import TARGETS, notes, render
from shardwright.launch.kubernetes.schemas import Schema, check_core, read_manifests, read_schemas, to_yaml

SCHEMAS = "SHARDWRIGHT_CRDS"
K8S_HELP = """\
Render, check and explain jobs on Kubernetes.

A job is read from the YAML of an MSJob: Scheduler, PS and Worker with their pod templates. It is rendered as a JobSet, as
a TrainJob of Kubeflow Trainer with its runtime, or as an Indexed Job with a headless service. Nothing is sent to a cluster."""
K8S_EXAMPLES = """\
examples:
  shardwright k8s render job.yaml --to jobset > jobset.yaml
  shardwright k8s explain job.yaml
  shardwright k8s validate job.yaml jobset.yaml --crds crds/
  shardwright k8s dockerfile train.py > Dockerfile"""


def add_parser(commands: Any) -> None:
    """Adds the command and its arguments to the command line's commands."""
    parser = commands.add_parser(
        "k8s", help="render, check and explain jobs on Kubernetes", description=K8S_HELP, epilog=K8S_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=type(parser))
    shown = actions.add_parser("render", help="print the manifests of an MSJob")
    shown.set_defaults(command=_render, name="k8s render")
    told = actions.add_parser("explain", help="print what an MSJob becomes: its pods and what is injected into them")
    told.set_defaults(command=_explain, name="k8s explain")
    for action in (shown, told):
        action.add_argument("file", help="the MSJob; - is the standard input")
        action.add_argument("--to", choices=list(TARGETS), default="jobset", help="what to render; default: jobset")
    checked = actions.add_parser("validate", help="check MSJobs and manifests")
    checked.set_defaults(command=_validate, name="k8s validate")
    checked.add_argument("files", nargs="+", metavar="file", help="MSJobs and manifests; - is the standard input")
    where = f"folder of custom resource definitions; default: {SCHEMAS}"
    checked.add_argument("--crds", metavar="FOLDER", default=os.environ.get(SCHEMAS), help=where)
    built = actions.add_parser("dockerfile", help="print a Dockerfile whose image runs a script")
    built.set_defaults(command=_dockerfile, name="k8s dockerfile")
    built.add_argument("script", help="the script, relative to the folder that the image is built from")
    built.add_argument("--base", default="python:3.12-slim", help="the image to start from; default: python:3.12-slim")
    built.add_argument("--requirements", metavar="FILE", help="a file of requirements")


def _read(path: str) -> list[Any]:
    if path != "-" and not Path(path).is_file():
        raise _UsageError(f"there is no file {path}")
    try:
        return read_manifests(path)
    except ValueError as error:
        raise _UsageError(str(error)) from None


def _job(path: str) -> Job:
    found = _read(path)
    if len(found) != 1:
        raise _UsageError(f"{path} holds {len(found)} documents; give a file with one MSJob")
    return read_msjob(found[0])


def _render(arguments: argparse.Namespace) -> int:
    try:
        job = _job(arguments.file)
        print(to_yaml(render(job, arguments.to)), end="")
    except ShardwrightError as error:
        print(error, file=sys.stderr)
        return 1
    for line in notes(job, arguments.to):
        print(f"note: {line}", file=sys.stderr)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    try:
        print(explain(_job(arguments.file), arguments.to))
    except ShardwrightError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _dockerfile(arguments: argparse.Namespace) -> int:
    try:
        print(dockerfile(arguments.script, arguments.base, arguments.requirements), end="")
    except ShardwrightError as error:
        raise _UsageError(str(error)) from None
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    if arguments.crds is not None and not Path(arguments.crds).is_dir():
        raise _UsageError(f"there is no folder {arguments.crds}")
    schemas = {} if arguments.crds is None else read_schemas(arguments.crds)
    worst = 0
    for path in arguments.files:
        for manifest in _read(path):
            wrong, what = _problems(manifest, schemas)
            print(f"{path}: {what}: {'cannot be checked' if wrong is None else f'{len(wrong)} problems' if wrong else 'fine'}")
            if wrong is None:
                print(f"  no schema of its kind is known; give --crds FOLDER or set {SCHEMAS}: `kubectl get crd -o yaml`")
            for line in wrong or ():
                print(f"  {line}")
            worst = max(worst, 0 if wrong == [] else 1)
    return worst


def _problems(manifest: Any, schemas: Mapping[tuple[str, str], Schema]) -> tuple[list[str] | None, str]:
    """Returns what is wrong with a manifest, ``None`` where nothing can tell, and what it is."""
    if not isinstance(manifest, Mapping):
        return [f"it is {manifest!r}; write a mapping"], "a document"
    kind, version = str(manifest.get("kind")), str(manifest.get("apiVersion"))
    name = manifest.get("metadata", {}).get("name") if isinstance(manifest.get("metadata"), Mapping) else None
    what = f"{kind} {name}" if name else kind
    if kind == KIND:
        try:
            read_msjob(manifest)
        except ShardwrightError as error:
            return list(getattr(error, "problems", ()) or [str(error)]), what
        return [], what
    schema = schemas.get((version, kind))
    return (check_core(manifest) if schema is None else schema.check(manifest)), what
