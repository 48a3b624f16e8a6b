"""The public API: an ``AutoParallel`` and what a user says to it.

====================  ===========================================================================================
``auto_parallel``     capture, plan, partition, run
``bound``             one callable, captured, planned, partitioned and bound for one signature of inputs
``call_key``          the part of a call's signature that its inputs make
``held``              an ``AutoParallel`` as an attribute of a module, whose parameters that module may not have
``hybrid``            the mode "hybrid_parallel": a program of one rank, bound to run on all
``marking``           strategies, recompute marks and layouts that a user puts on functions, modules and tensors
``marks``             gathers the strategies given to modules and parameters, by name or on the modules themselves
``plan_for``          shapes only, nothing is computed and no memory taken
``settings``          what a user asks of an ``AutoParallel``, apart from marks on operators
``settings_methods``  the methods of an ``AutoParallel`` that change its settings
``stages``            from a callable to its graph, from the graph to its plan
``train_step``        functions that run as they are, while what they call is parallel
====================  ===========================================================================================
"""
