"""Choices: the ways in which an operator can run, on which meshes, and which fits its neighbours.

===============  =======================================================================================
``candidates``   the ways an operator may run, and which of them suits what is already decided around it
``common_mesh``  one mesh on which every strategy over the same ranks can be named
``edges``        from where a value is to how an operator reads it, and the bytes that it costs
``follow``       the choice of an operator that keeps its inputs where they are
``meshes``       the factorisations of a device count that are worth planning on
``tables``       every way an operator may run on a mesh, as one table
===============  =======================================================================================
"""
