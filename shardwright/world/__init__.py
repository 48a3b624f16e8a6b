"""Worlds: run local programs and collectives, on the processes of a job or on simulated ranks.

================  =========================================================================================
``current``       the current world, the only global state of the package
``distributed/``  one rank per process, over ``torch.distributed``
``execute/``      code that both worlds share to run a program
``job/``          reads what launchers say about the ranks
``simulated/``    all ranks in one process, in lock step
``world``         the interface of both worlds
================  =========================================================================================
"""
