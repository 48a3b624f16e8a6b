"""Training: one table of passes, and a folder per feature.

=======================  ================================================================================================
``accumulation/``        runs a batch in parts, one after the other
``compile/``             compiles the calls between moves with ``torch.compile``
``copies/``              splits a batch into copies that take turns, one computing while another communicates
``fusion/``              sets which parameters share collectives
``optimizer_parallel/``  stores parameters split over the ranks that would hold the same
``outputs/``             outputs that stay split until they are read
``passes``               the changes of a graph, its plan and its program on the way from a model to what a rank runs
``precision/``           the dtypes in which programs compute and communicate
``recompute/``           computes values again in the backward pass instead of keeping them
=======================  ================================================================================================
"""
