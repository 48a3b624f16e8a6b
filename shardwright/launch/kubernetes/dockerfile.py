"""Writes a Dockerfile whose image runs a script."""

from __future__ import annotations

from pathlib import PurePosixPath

from shardwright.errors import StrategyError


def dockerfile(script: str, base: str = "python:3.12-slim", requirements: str | None = None) -> str:
    """Returns a Dockerfile for the folder that a script is in.

    Args:
        script: path of the script, relative to the folder of the Dockerfile.
        base: the image to start from; of torch, one with CUDA for GPUs.
        requirements: a file of requirements, relative to the same folder.

    Raises:
        StrategyError: a path that leads out of the folder.

    >>> print(dockerfile("train.py"))
    FROM python:3.12-slim
    RUN pip install --no-cache-dir shardwright
    WORKDIR /workspace
    COPY . .
    USER 1000
    CMD ["python", "train.py"]
    <BLANKLINE>
    """
    for path in filter(None, (script, requirements)):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise StrategyError(f"{path} is not within the folder that the image is built from; give a path relative to it")
    needed = [f"COPY {requirements} .", f"RUN pip install --no-cache-dir -r {requirements}"] if requirements else []
    lines = [f"FROM {base}", "RUN pip install --no-cache-dir shardwright", "WORKDIR /workspace", *needed, "COPY . ."]
    return "\n".join([*lines, "USER 1000", f'CMD ["python", "{script}"]', ""])
