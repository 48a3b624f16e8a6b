"""Hybrid parallel: programs that users write per rank, with collectives of their own.

===============  ========================================================================================================
``call``         runs a collective at once on a real rank, or puts it into the program that is captured
``capture``      the graphs of all ranks' programs: captured once per kind of rank, and checked to be one program
``collectives``  collectives by the name of a mesh axis, for per-rank programs
``functions``    local functions of per-rank programs
``mesh``         the mesh of collectives in user code, and the rank whose program is being captured
``owned_slice``  parameters of which each rank owns a slice, in per-rank programs
``program``      makes one local program of the user's per-rank programs
``steps``        a user's collective as a redistribution: its steps, and those of its gradient
``writer``       builds the local program of a per-rank user program
===============  ========================================================================================================
"""
