"""Plans: a layout for every tensor, asked for, followed, searched, priced and kept in files.

============  ==================================================================================================
``asked/``    checks what users ask of a plan: strategies, pinned layouts, attributes, sizes
``choose/``   the ways in which an operator can run, on which meshes, and which fits its neighbours
``file/``     plan files: written, read and matched to a graph
``memory/``   predicts the memory of one rank over a training step, without running the step
``modes/``    the planners, one per parallel mode
``price/``    what a step costs, operator by operator and move by move
``problem/``  the search problem of a graph on a mesh: variables, choices, prices
``request``   what is asked of a plan
============  ==================================================================================================
"""
