"""The command line: one file per command, and what they share.

=============  ======================================================================================================
``calibrate``  measures this machine for the price model
``layout``     what each rank holds of a tensor, for any layout
``main``       runs the command that the arguments name, also as ``python -m shardwright``
``options``    what the commands share in reading their arguments and printing errors
``plan``       the command ``shardwright plan``: a plan for devices one does not have, from a script, on shapes alone
``run``        a script on simulated ranks, or on processes of this machine
``script``     scripts of users, run within a command: what goes wrong in one is said by its own line
=============  ======================================================================================================
"""
