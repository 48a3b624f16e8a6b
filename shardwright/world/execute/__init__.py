"""Execution: code that both worlds share to run a program.

=============  =======================================================================================================
``ambient``    modes and random state under which a computation ran, for running it a second time
``checks``     checks the pieces that ranks give, as a wrong one would leave other ranks waiting
``log``        records kind, axes, groups, bytes and cause of every collective that runs
``recipes``    computes values again that the backward pass needs and that are not kept for it
``recording``  one run of a program that does not keep all its values for the backward pass
``source``     writes a local program as the source of one Python function, so that running it costs no interpretation
``summation``  the order and the precision in which ranks' contributions are combined: the same in every world
=============  =======================================================================================================
"""
