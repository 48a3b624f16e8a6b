"""Prices of plans: what a step costs, operator by operator and move by move.

================  ============================================================================================
``alternatives``  what an operator would cost under every other choice, everything around it being as it is
``in_wires``      moves in other dtypes than their value's
``own_orders``    what moves where axes split a dim in another order than the mesh's
``plan_price``    what a plan costs on a machine, by operator, by redistribution and by parameter
``price_of``      the price of a plan on a machine, with what it computes again; on its own machine remembered
``recomputed``    what a plan computes and sends a second time, in the backward, instead of keeping it
``values``        what a plan's operators, moves and parameters cost, and their sums
================  ============================================================================================
"""
