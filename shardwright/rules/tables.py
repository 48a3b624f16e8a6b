"""Every family of rules, and the traits of their operators. Importing this module registers them all."""

import shardwright.rules.attention
import shardwright.rules.conv
import shardwright.rules.create
import shardwright.rules.field_lookup
import shardwright.rules.index
import shardwright.rules.join_and_cut
import shardwright.rules.loss
import shardwright.rules.matmul
import shardwright.rules.no_rule
import shardwright.rules.norm
import shardwright.rules.opaque
import shardwright.rules.pointwise
import shardwright.rules.random
import shardwright.rules.recurrent
import shardwright.rules.reduce
import shardwright.rules.self_defined
import shardwright.rules.view  # noqa: F401
