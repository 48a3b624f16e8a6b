"""Simulated world: all ranks in one process, in lock step.

=========  ========================================================================
``bind``   binds a local program to simulated ranks, as one generated function
``moves``  redistributions as differentiable functions of lists of tensors
``steps``  the collectives of the simulated world
``world``  all ranks in lock step in one process, differentiable, with exact values
=========  ========================================================================
"""
