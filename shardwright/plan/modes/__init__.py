"""Modes: the planners, one per parallel mode.

===============  ===================================================================================================
``attempt``      one search on one mesh, and the interface of the planner that makes it
``planner``      visits the operators of a graph in order and gives each a choice
``propagation``  plans from the configured operators to all others, with the least redistribution
``recursive``    searches two mesh axes after the other, each level an exact problem of a few choices
``search``       searches the whole plan, with the user's strategies as pinned choices of the same problem
``semi_auto``    follows strategies, plans the rest as data parallel, and redistributes in between
``table``        which planner makes the plan of a graph
===============  ===================================================================================================
"""
