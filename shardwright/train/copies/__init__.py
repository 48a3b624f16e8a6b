"""Copies: parts of a batch that take turns, one computing while another communicates.

======================  ========================================================================================
``module``              the batch of one step in several copies, so that one computes while another communicates
``one_copy``            the operator call that does for one part of a batch what a given call does for all of it
``shared_nodes``        what copies make of parameters alone is made once
``turns``               an order of instructions in which the copies of a batch take turns
``virtual_axis``        operators whose Layouts have ``"interleaved_parallel"`` run in copies on every device
``virtual_axis_rules``  where ``"interleaved_parallel"`` may stand in an operator's Layouts
======================  ========================================================================================
"""
