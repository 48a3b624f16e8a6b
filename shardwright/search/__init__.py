"""Search: finds the cheapest choices of a problem of nodes and edges. It knows nothing of tensors.

===================  =========================================================================================================
``alike``            copies of a repeat that may as well choose the same do, so that a person reads one layer instead of many
``bounds``           A lower bound for problems too wide for elimination
``branch``           what raises the bound where a relaxation alone leaves a gap
``dead_ends``        drops choices that another choice of the same node beats whatever its neighbours do
``elimination``      an exact minimum over many variables, one variable at a time
``fold``             exact solution of a problem with repeats, as long as the tables stay within a budget
``integer_program``  the same problem as an integer program, for HiGHS: an independent referee
``memory_limit``     the least cost under a limit on memory
``minplus``          the one numeric kernel of the search, and powers of a matrix in its algebra
``pareto``           elimination that keeps, instead of the least cost, every pair of cost and memory that no other pair beats
``problem``          one choice per node, prices on nodes and edges, perhaps a limit on memory
``rounding``         assignments of low cost, without proof: read off a relaxation, then improved move by move
``solve``            one call that picks the method
``unlimited``        exact where the width allows, bounds and rounding elsewhere
===================  =========================================================================================================
"""
