"""Delayed initialisation: parameters that are made on the ranks that hold them, and nowhere else.

============  ===================================================================================
``record``    the operators that make a tensor which does not exist yet
``recorder``  builds a model on the meta device, whose values are made later, one parameter at a time
``replay``    makes delayed tensors, or one rank's slices of them, from their record
============  ===================================================================================
"""
