"""Pipelines: a model becomes stages on disjoint sets of devices, and micro-batches stream through them.

==============  ==================================================================================
``cell``        the network of a pipeline, its marks, and what is asked of it
``stages``      assigns the operators of a graph to stages
``cut``         cuts the graph into one graph per stage
``means``       rewrites means whose count depends on the data, so that micro-batches can add up
``batch``       finds where the batch is in the values of a graph
``rows``        rewrites reshapes that put the batch behind another dim
``micro``       puts an axis of micro-batches into the plan of a stage
``refusals``    says why an operator cannot compute a micro-batch by itself, and what to change
``sums``        operators that may read sums over micro-batches pending, and values shared out among them
``tail``        what the last stage computes with the whole batch, after all micro-batches
``parts``       takes the program of a stage apart into what runs once and what each micro-batch runs
``stage_run``   runs forward and backward of one stage for one micro-batch
``split_backward``  splits a backward: gradients of inputs at once, those of weights later
``crossing``    moves pieces of values between the ranks of two stages
``scheduling``  chooses the schedule that a batch runs with
``stage_times``  seconds of the stages, from the prices of their plans
``memory``      predicts the memory of each row over a step
``micro_memory``  simulates the memory of one micro-batch of a stage
``pipeline_plan``  the plan as it is shown
``passes``      the forward and the backward of a step, as autograd runs them
``run``         runs all stages on simulated ranks, each action as soon as it can
``flight``      messages of one step under way between the ranks of a job
``distributed_run``  runs the stages of one rank of a job, by direct messages
``random_turns``  random numbers that stages draw one after the other
``elsewhere``   results that other ranks hold
``tied_gradients``  adds the gradients of parameters that several rows of a job hold
``schedules/``  in which order each rank runs its stages' work: named, searched, checked, and timed
==============  ==================================================================================
"""
