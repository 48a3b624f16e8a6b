"""Partition: makes the local program that one rank runs, from a graph and its plan.

=================  ==========================================================================================
``builder``        writes the instructions of a local program
``free_results``   finds values and gradients that nobody else holds, so that a sum over ranks may be in place
``local_program``  the only way from a plan to its local program: partitions it and runs the plan's passes
``overlap``        decides which moves share a collective, and which start early
``partitioner``    makes the local program of a graph and its plan
``sharing``        decides how the readers of one value share redistributions
=================  ==========================================================================================
"""
