"""Command line: one file per command, and what they share.

==============  ======================================================================================================
``calibrate``   measures this machine for the price model
``checkpoint``  looks into checkpoints, verifies them, writes them in other slices and formats
``k8s``         renders, checks and explains jobs on Kubernetes
``layout``      prints and draws the slice of a tensor that each rank holds, for any layout
``main``        runs the command that the arguments name, also as ``python -m shardwright``
``options``     reads arguments and prints errors, for all commands
``plan``        plans a script's model for devices that need not exist, on shapes only
``run``         runs a script on simulated ranks, or on processes of this machine
``script``      runs scripts of users within a command, and reports their errors by their own lines
==============  ======================================================================================================
"""
