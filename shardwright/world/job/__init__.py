"""Jobs: what launchers say about the ranks.

============  ================================
``torchrun``  reads the variables that it sets
============  ================================
"""
