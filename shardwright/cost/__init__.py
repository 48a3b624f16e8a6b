"""Cost: seconds and bytes of operators and collectives on a machine, in closed form.

=================  ======================================================================================================
``algorithms``     a table of the fastest algorithm of every collective, by size and by number of ranks
``communication``  prices redistributions, in closed form, for whole tables of layouts
``compute``        prices operators on one rank, by the roofline of their family
``convolution``    counts the operations that kernels of convolutions spend on padded channels
``machine_files``  machines as TOML files: the presets, and the one calibrated here
``memory``         bytes that a rank holds of tensors, that operators keep, and that redistributions need, in closed form
``message_sizes``  limits by which collectives on gloo cut what they send, which decide memory too
``operations``     counts the operations of an operator
``saved``          finds what autograd saves for an operator's backward, by running the operator on shapes only
=================  ======================================================================================================
"""
