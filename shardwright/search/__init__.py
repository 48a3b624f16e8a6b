"""Search: finds the cheapest choices of a problem of nodes and edges. It does not know of tensors.

===================  =========================================================================================================
``alike``            makes copies of a repeat choose the same where that costs nothing
``bounds``           computes a lower bound for problems too wide for elimination
``branch``           branch and bound, which raises the bound where a relaxation leaves a gap
``dead_ends``        drops choices that another choice of the same node beats whatever its neighbours do
``elimination``      an exact minimum over many variables, one variable at a time
``fold``             exact solution of a problem with repeats, as long as the tables stay within a budget
``integer_program``  the same problem as an integer program, for HiGHS: an independent referee
``memory_limit``     finds the least cost under a limit on memory
``minplus``          the numeric kernel of the search: minima over sums of tables, and min-plus powers of matrices
``pareto``           elimination that keeps, instead of the least cost, every pair of cost and memory that no other pair beats
``problem``          one choice per node, prices on nodes and edges, perhaps a limit on memory
``rounding``         assignments of low cost, without proof: read off a relaxation, then improved move by move
``solve``            solves a problem by the method that fits it
``unlimited``        finds the least cost without a limit: exactly if the width allows, else by bounds and rounding
===================  =========================================================================================================
"""
