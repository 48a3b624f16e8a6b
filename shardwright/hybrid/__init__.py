"""Hybrid parallel: programs that users write for one rank, with collectives of their own.

===============  ========================================================================================================
``call``         at once on a real rank, or as an operator of the program that is captured
``capture``      the graphs of all ranks' programs: captured once for each kind of rank, and found to be one program
``collectives``  collectives by the name of a mesh axis, for programs that say themselves what each rank does
``functions``    local functions of programs that users write for one rank
``mesh``         the mesh that collectives in user code are over, and whose turn it is while a rank's program is captured
``own``          parameters of which each rank owns a slice, in programs that say themselves what each rank does
``program``      the program of one rank, written by the user with collectives in it, as a local program
``steps``        what a collective called by a user is, as a redistribution: its steps, and those of its gradient
``writer``       builds the local program of a per-rank user program
===============  ========================================================================================================
"""
