"""Execution: what both worlds share in running a program.

=============  =======================================================================================================
``ambient``    modes and random state under which a computation ran, for running it again
``checks``     checked, for a wrong piece would leave other ranks waiting
``log``        kind, axes, groups, bytes and cause of every one that runs
``recipes``    how values that the backward pass needs, and that are not kept for it, are computed again
``recording``  one run of a program that does not keep all its values for the backward pass
``source``     writes a local program as the source of one Python function, so that running it costs no interpretation
``summation``  the order and the precision in which ranks' contributions are combined: the same in every world
=============  =======================================================================================================
"""
