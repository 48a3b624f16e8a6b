"""Modes: the planners, one per parallel mode.

===============  ===================================================================================================
``attempt``      one search on one mesh, and what the ways to search ask of the planner that makes it
``planner``      visits the operators of a graph in order and gives each a choice
``propagation``  from the operators that are configured to all others, with the least redistribution
``recursive``    the devices are cut along two mesh axes after the other, each cut an exact problem of a few choices
``search``       the whole plan searched for, the user's strategies taken as pinned choices of the same problem
``semi_auto``    configured operators as told, the rest data parallel, anything in between redistributed
``table``        which planner makes the plan of a graph
===============  ===================================================================================================
"""
