"""The distributed world: one rank per process, over ``torch.distributed``.

======================  ============================================================================================
``backend``             collectives of the backend, such as NCCL's, as algorithms beside our own
``bind``                binds a local program to a process of a job, as one generated function
``groups``              the process groups of a mesh, made once, and the links over them
``links``               prepared once, then run at once or started now and waited for later
``message_algorithms``  algorithms of collectives made of point-to-point messages
``messages``            collectives made of gloo's direct messages, for what its own do slowly
``moves``               redistributions as differentiable functions of local tensors
``operations``          communication that is under way, finished in the order in which it began
``places``              where received pieces go in the tensor that they make up
``shared_steps``        moves of several tensors that travel in one message
``starts``              moves that are started early on one rank, and ended one by one where their results are read
``steps``               the steps of a redistribution on one rank's tensor: the collectives of the distributed world
``transfer``            every region goes from where it is to where it belongs, uncopied if it can
``world``               this process is one rank of a real job, and collectives run through ``torch.distributed``
======================  ============================================================================================
"""
