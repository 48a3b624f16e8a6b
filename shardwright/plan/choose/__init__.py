"""Choices: the ways in which an operator can run, on which meshes, and which fits its neighbours.

===============  =======================================================================================
``candidates``   the ways an operator may run, and which of them fits its decided neighbours
``common_mesh``  one mesh on which every strategy over the same ranks can be named
``edges``        the edges of a plan and the bytes that they cost
``follow``       finds the choice of an operator that keeps its inputs where they are
``meshes``       the factorisations of a device count that are worth planning on
``tables``       every way an operator may run on a mesh, as one table
===============  =======================================================================================
"""
