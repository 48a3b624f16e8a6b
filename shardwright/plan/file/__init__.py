"""Plan files: written, read and matched to a graph.

==========  ==========================================================================
``format``  a plan, or a part of one, as text that a person can read, compare and edit
``match``   matches a plan file to a graph, and makes the plan that it gives
``read``    reads plan files, and reports all problems at once
``write``   writes plans, strategies and layouts of parameters to files
==========  ==========================================================================
"""
