"""Optimizer parallel: parameters stored split over the ranks that would hold the same.

============  ========================================================================================
``cut_axis``  rewrites a plan for a mesh in which one axis is split in two
``stored``    splits parameters, gradients and optimizer states over the ranks that would hold the same
============  ========================================================================================
"""
