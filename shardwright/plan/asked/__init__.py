"""What users ask of a plan: strategies, pinned layouts, attributes, sizes, all checked.

======================  =============================================================================================
``attributes``          what ``add_prim_attr`` asks of an operator, written into the graph before anything is planned
``given_layouts``       what users said of where values are, and what follows from that, before anything is planned
``nd_tensor_parallel``  products whose operands rest more finely split than they are computed with
``own_layouts``         attributes by which a user takes layouts into their own hands
``pins``                an operator's layouts as a plan file says them, turned into the very choice that has them
``sizes``               ``80GB`` of memory, an optimizer by its name
``splits``              choices that layouts or slice counts stand for
``strategies``          what a user asked of an operator, checked against its rule and turned into axes
======================  =============================================================================================
"""
