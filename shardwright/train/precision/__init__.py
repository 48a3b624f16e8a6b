"""Mixed precision: the dtypes in which programs compute and communicate.

=========  ================================================================================================
``casts``  the inputs of an operator that torch reads in another dtype, found by running it on fake tensors
``wires``  the dtypes in which moves travel
=========  ================================================================================================
"""
