"""Delayed initialisation: parameters that are made on the ranks that hold them, and there alone.

============  ===================================================================================
``record``    what was called to make a tensor that does not exist yet
``recorder``  build a model on the meta device now, make its values one parameter at a time later
``replay``    makes delayed tensors, or one rank's slices of them, from their record
============  ===================================================================================
"""
