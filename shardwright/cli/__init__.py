"""Command line: one file per command, and what they share.

================  ======================================================================================================
``calibrate``     measures this machine for the price model
``checkpoint``    looks into checkpoints, verifies them, writes them in other slices and formats
``k8s``           renders, checks and explains jobs on Kubernetes
``layout``        prints and draws the slice of a tensor that each rank holds, for any layout
``main``          runs the command that the arguments name, also as ``python -m shardwright``
``options``       reads arguments and prints errors, for all commands
``plan``          plans a script's model for devices that need not exist, on shapes only
``run``           runs a script on simulated ranks, or on processes of this machine and others
``run_binding``   reads the cores and NUMA nodes that ``run`` binds ranks to
``run_flags``     options of jobs for ``run``, with their older spellings
``run_settings``  finds the job that the options of ``run`` describe
``script``        runs scripts of users within a command, and reports their errors by their own lines
================  ======================================================================================================
"""
