"""Process groups: facts about them that torch keeps in several places."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def backend_of(group: Any, device_type: str) -> str:
    """Returns the name of the backend that serves tensors of ``device_type`` in a process group."""
    served = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    return served.get(device_type) or str(dist.get_backend(group))
