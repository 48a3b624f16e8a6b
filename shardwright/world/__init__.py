"""Worlds: what runs local programs and collectives, be it the processes of a job or simulated ranks.

================  =========================================================================================
``current``       the only global state of the package
``distributed/``  one rank per process, over ``torch.distributed``
``execute/``      what both worlds share in running a program
``job/``          what launchers say about the ranks
``simulated/``    all ranks in one process, in lock step
``world``         what runs local programs and collectives, be it the processes of a job or simulated ranks
================  =========================================================================================
"""
