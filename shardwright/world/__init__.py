"""What runs local programs: the processes of a job, or simulated ranks.

- ``world``: what both of them do, which is all that others ask of them; ``current``: the one there is, and ``init``.
- ``simulated/``: all ranks in one process, each call once a lane. ``distributed/``: one rank, on ``torch.distributed``.
- ``execute/``: what both need to turn a program into one Python function, to compute parts of it again, and to log it.
- ``job/``: how a process finds the others.
"""
