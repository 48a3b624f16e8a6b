"""Partition: Graph and Plan to the local program that one rank runs.

=================  ==========================================================================================
``builder``        writes the instructions of a local program
``free_results``   values and gradients that nobody else holds, so that a sum over ranks may be done in place
``local_program``  partitioned, and sent through the plan's passes
``overlap``        decides which moves share a collective, and which start early
``partitioner``    graph and Plan to the local program
``sharing``        how the readers of one value share redistributions
=================  ==========================================================================================
"""
