"""Communication fusion: parameters that share collectives.

============  ================================================================================
``settings``  which parameters' gradients are reduced, or which are gathered, in one collective
============  ================================================================================
"""
