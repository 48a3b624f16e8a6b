"""Redistribution: the cheapest steps from one layout to another, and what they send and hold.

==================  ===================================================================================================
``layout_algebra``  small functions on layouts and steps for the planner
``links``           prices a step in seconds, by the axes it runs over
``paths``           lists the sequences of collectives for many redistributions at the same time
``planner``         finds the cheapest steps from one layout to another
``routes``          pairs of ranks and the regions they send, when every rank gets exactly what it lacks
``steps``           the steps that turn one layout of a tensor into another, forward and backward
``volume``          elements that each rank holds and lacks, and the lower bound of what a redistribution must move
==================  ===================================================================================================
"""
