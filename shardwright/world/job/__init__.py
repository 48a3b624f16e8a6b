"""Jobs: reads what launchers say about the ranks.

============  ===========================================
``torchrun``  reads the variables that torchrun sets
============  ===========================================
"""
