"""Plan files: written, read and matched to a graph.

==========  ==========================================================================
``format``  a plan, or a part of one, as text that a person can read, compare and edit
``match``   a plan file met with a graph, and the plan that comes of it
``read``    reads plan files, all problems at once
``write``   writes plans, strategies and layouts of parameters to files
==========  ==========================================================================
"""
