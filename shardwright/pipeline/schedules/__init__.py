"""Schedules: in which order each rank of a pipeline runs its stages' work. They know of no tensors.

==================  =============================================================================================
``actions``         one thing that a rank does, such as 0F1: stage, kind, micro-batch
``bound``           a lower bound on the seconds of every schedule
``check``           proves that a schedule does all of the work once and does not deadlock; the peak in flight
``clock``           when each action runs, given the seconds of the stages: bubbles, peak memory
``draw``            a timeline as a picture, or as a trace for a browser
``execution``       runs rows against a clock, each action once its rank is free and what it waits for is done
``list_scheduler``  schedules by letting each free rank do what is most urgent under a policy
``named``           the published schedules by their names: GPipe, 1F1B, interleaved, zero-bubble, in slices
``parameters``      when stages gather their parameters, free them, and add up their gradients
``repair``          improves rows by moving actions of the critical path
``schedule``        for each rank its actions in their order; read and written as torch's CSV
``search``          a schedule of least time for stages that take different times, under a limit on activations
==================  =============================================================================================
"""
