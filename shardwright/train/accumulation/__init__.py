"""Gradient accumulation: a batch in parts, one after the other.

==========  =========================================================================================
``cut``     cuts a program into what runs once for a batch and what runs for each of its parts
``module``  a batch in several parts, one after the other, and one reduction of the gradients for all
``run``     runs the parts of a batch one after another and averages what they give
==========  =========================================================================================
"""
