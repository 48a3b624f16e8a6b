"""Public API: an ``AutoParallel`` and what a user says to it.

====================  ===========================================================================================
``ambiguous``         targets that are refused: ambiguous names, what splits batches or scales losses, nets within nets
``auto_parallel``     captures, plans, partitions and runs a callable
``bound``             a callable, captured, planned, partitioned and bound for one signature of inputs
``call_key``          the part of a call's signature that its inputs make, and what differs from an earlier one
``decided``           calls whose Python decides by values of tensors: undone and repeated where it decides otherwise
``target_as_module``  the parameters, buffers and submodules that an ``AutoParallel`` has of its target
``hybrid``            the mode "hybrid_parallel": a per-rank program, bound to run on all ranks
``inner_results``     results that others are computed of, whose gradients would not be whole
``marking``           strategies, recompute marks and layouts that a user puts on functions, modules and tensors
``marks``             gathers the strategies given to modules and parameters, by name or on the modules themselves
``pipeline``          pipelines: a callable cut into stages, each planned and bound on ranks of its own
``pipeline_planning`` from a callable to the plan of a pipeline, on shapes
``pipeline_stages``   cuts a graph into stages, plans each on its ranks, and takes their programs apart
``pipeline_job``      pipelines on the processes of a job: their parameters, and the programs of each rank
``plan_for``          plans for devices one does not have, on shapes only
``settings``          the settings of an ``AutoParallel``, apart from marks on operators
``settings_methods``  the methods of an ``AutoParallel`` that change its settings
``stages``            from a callable to its graph, and from the graph to its plan
``train_step``        functions that run as they are, while what they call is parallel
====================  ===========================================================================================
"""
