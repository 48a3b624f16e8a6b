"""Recompute: values that are computed again in the backward pass instead of kept.

=============  ============================================================================================
``automatic``  chooses modules to compute again so that a step fits into memory, at the least cost
``marked``     marks instructions of a local program to run again in the backward pass
``pieces``     keeps slices, one per rank, of values that many ranks hold alike
``request``    the user's requests to compute modules again in the backward pass
=============  ============================================================================================
"""
