"""Outputs that stay split over the ranks until somebody reads them.

================  ===================================================================================================
``read_later``    chooses the outputs that a program need not make whole
``reader``        makes the program that makes one of them whole
``split_output``  the tensor that a caller gets: whole as soon as an operator reads it
================  ===================================================================================================
"""
