"""Redistribution: the cheapest steps from one layout to another, and what they send and hold.

==================  ===================================================================================================
``layout_algebra``  small questions about layouts and steps that the planner asks
``links``           what a step costs in seconds, by the axes it runs over
``paths``           the sequences of collectives that a redistribution may be, for many redistributions side by side
``planner``         the cheapest steps from one layout to another
``routes``          which rank sends which region to which, when every rank gets exactly what it lacks
``steps``           the steps that turn one layout of a tensor into another, forward and backward
``volume``          how much each rank holds, and how much it lacks: the lower bound of what a redistribution must move
==================  ===================================================================================================
"""
