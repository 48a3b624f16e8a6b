"""The search problem of a graph on a mesh: variables, choices, prices.

===============  =============================================================================================
``blocks``       the repeated blocks of a graph, found once so that planning can think in one of their copies
``formulation``  a graph and a cost model as a problem for :mod:`shardwright.search`
``prices``       what choices and redistributions cost on a machine, as whole tables; each kind is priced once
``ready``        which operators can start their moves early
===============  =============================================================================================
"""
