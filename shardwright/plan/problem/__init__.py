"""Search problem of a graph on a mesh: variables, choices, prices.

===============  =============================================================================================
``blocks``       finds the repeated blocks of a graph, so that planning can work on one of their copies
``formulation``  writes a graph and a cost model as a problem for :mod:`shardwright.search`
``prices``       prices choices and redistributions on a machine, as whole tables; each kind is priced once
``ready``        which operators can start their moves early
===============  =============================================================================================
"""
