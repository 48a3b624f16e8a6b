"""Every family of rules: importing this module registers them all."""

import shardwright.rules.matmul
import shardwright.rules.pointwise  # noqa: F401
