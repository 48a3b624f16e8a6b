"""Recompute: what is computed again in the backward pass instead of kept.

=============  ============================================================================================
``automatic``  which modules to compute again so that a step fits into memory, at the least cost
``marked``     which instructions of a local program are not kept for the backward pass but run again there
``pieces``     of a value that many ranks hold alike, each keeps a slice for the backward pass
``request``    what a user asks for when modules are to be computed again in the backward pass
=============  ============================================================================================
"""
