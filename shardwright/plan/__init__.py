"""Plans: a layout for every tensor, asked for, followed, searched, priced and kept in files.

============  ==================================================================================================
``asked/``    strategies, pinned layouts, attributes, sizes, all checked
``choose/``   the ways in which an operator can run, on which meshes, and which fits its neighbours
``file/``     written, read and matched to a graph
``memory/``   what one rank needs over a training step, operator by operator, predicted without running the step
``modes/``    the planners, one per parallel mode
``price/``    what a step costs, operator by operator and move by move
``problem/``  variables, choices, prices
``request``   what is asked of a plan
============  ==================================================================================================
"""
