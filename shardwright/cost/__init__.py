"""Cost: seconds and bytes of operators and collectives on a machine, in closed form.

=================  ======================================================================================================
``algorithms``     for every collective, the best algorithm by size and by number of ranks; as data
``communication``  what redistributions cost, in closed form, for whole tables of layouts at once
``compute``        what operators cost a rank, by the roofline of their family
``convolution``    how their kernels come to do more than the operations that a convolution has
``machine_files``  machines as TOML, the presets, and what was calibrated here
``memory``         bytes that a rank holds of tensors, that operators keep, and that redistributions need, in closed form
``message_sizes``  the limits by which collectives on gloo cut what they send, and the memory that follows from them
``operations``     how many an operator does
``saved``          what autograd keeps of an operator for its backward, found by running the operator on shapes alone
=================  ======================================================================================================
"""
