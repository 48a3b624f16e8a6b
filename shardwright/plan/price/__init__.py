"""Prices of plans: what a step costs, operator by operator and move by move.

================  ============================================================================================
``alternatives``  prices every other choice of an operator, with everything around it unchanged
``in_wires``      prices moves in other dtypes than their value's
``own_orders``    prices moves where axes split a dim in another order than the mesh's
``plan_price``    prices a plan on a machine, by operator, by redistribution and by parameter
``price_of``      the price of a plan on a machine, with what it computes again; cached for its own machine
``recomputed``    prices what a plan computes and sends a second time, in the backward
``values``        prices of a plan's operators, moves and parameters, and their sums
================  ============================================================================================
"""
