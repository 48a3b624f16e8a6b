"""Optimizer parallel: parameters stored split over the ranks that would hold the same.

============  ========================================================================================
``cut_axis``  the same plan on a mesh that names one of its axes in two parts
``stored``    parameters, gradients and optimizer states split over the ranks that would hold the same
============  ========================================================================================
"""
