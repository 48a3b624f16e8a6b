"""Follows strategies, plans the rest as data parallel, and redistributes in between.

Three passes over the graph:

1. *Data parallel*: what every operator would do if nothing were configured and the batch were split over all ranks.
   Values that no batch reaches (parameters and what is made of them) are free: they may be wherever they are wanted.
2. *Forward*: configured operators take their strategies; operators inside a marked function or module follow their
   inputs; all others do what they do under data parallel.
3. *Backward*: free values, last to first, are laid out as their readers want them; parameters are stored so.
"""

from __future__ import annotations

from shardwright.ir.graph import Graph
from shardwright.ir.plan import Plan
from shardwright.plan.modes.planner import Planner
from shardwright.plan.request import PlanRequest


def plan_semi_auto(graph: Graph, request: PlanRequest) -> Plan:
    """Plans a graph by the strategies of its marks.

    Raises:
        StrategyError: lists every problem of every strategy; nothing has been run.
    """
    return Planner(graph, request).plan()
