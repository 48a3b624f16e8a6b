"""Training: one table of passes, and a folder per feature.

=======================  ================================================================================================
``accumulation/``        a batch in parts, one after the other
``compile/``             the calls between moves as functions that ``torch.compile`` makes
``copies/``              parts of a batch that take turns, one computing while another communicates
``fusion/``              parameters that share collectives
``optimizer_parallel/``  parameters stored split over the ranks that would hold the same
``passes``               what changes a graph, its plan and its local program on the way from a model to what a rank runs
``precision/``           the dtypes in which programs compute and communicate
``recompute/``           what is computed again in the backward pass instead of kept
=======================  ================================================================================================
"""
