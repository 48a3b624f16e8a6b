"""Gradient accumulation: a batch in parts, one after the other.

==========  =========================================================================================
``cut``     cuts a program into a part that runs once per batch and one that runs per micro-batch
``module``  the user's module: a batch in several parts, and one reduction of the gradients for all
``run``     runs the parts of a batch one after another and averages their results
==========  =========================================================================================
"""
