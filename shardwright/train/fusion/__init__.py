"""Communication fusion: parameters that share collectives.

============  ================================================================================
``settings``  parameters whose gradients are reduced, or which are gathered, in one collective
============  ================================================================================
"""
