"""Prints a rank's place, its arguments and what it is bound to: run by tests. It imports nothing that takes time."""

import json
import os
import sys
from pathlib import Path

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "SHARDWRIGHT_TIMEOUT")
shown = {name: os.environ.get(name) for name in NAMES}
shown["arguments"] = sys.argv[1:]
shown["cores"] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
maps = Path("/proc/self/numa_maps")
shown["memory"] = maps.read_text().split()[1] if maps.exists() else ""
os.write(2, b"an error\n")
os.write(1, f"{json.dumps(shown)}\n".encode())
