"""Copies: parts of a batch that take turns, one computing while another communicates.

======================  ========================================================================================
``module``              the user's module: the batch of one step in several copies
``one_copy``            builds the operator call that does for one part of a batch what a given call does for all
``shared_nodes``        makes once what all copies make of parameters alone
``turns``               orders instructions so that the copies of a batch take turns
``virtual_axis``        runs operators whose Layouts have ``"interleaved_parallel"`` in copies on every device
``virtual_axis_rules``  checks where ``"interleaved_parallel"`` may stand in an operator's Layouts
======================  ========================================================================================
"""
