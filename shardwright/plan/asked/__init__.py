"""Checks what users ask of a plan: strategies, pinned layouts, attributes, sizes.

======================  =============================================================================================
``attributes``          writes what ``add_prim_attr`` asks of operators into the graph, before anything is planned
``given_layouts``       learns where values are from the layouts that users gave, before anything is planned
``manual_split``        attributes that take an operator's layouts as the user gives them
``nd_tensor_parallel``  products whose operands are stored more finely split than they are computed with
``pins``                turns an operator's layouts in a plan file into the choice that has exactly them
``sizes``               reads ``80GB`` of memory, and an optimizer by its name
``splits``              finds the choices that layouts or slice counts stand for
``strategies``          checks an operator's strategy against its rule and turns it into axes
======================  =============================================================================================
"""
