"""Distributed world: one rank per process, over ``torch.distributed``, with MPI to move tensors where asked.

======================  ============================================================================================
``backend``             collectives of the backend, such as NCCL's, as algorithms beside our own
``bind``                binds a local program to a process of a job, as one generated function
``groups``              the process groups of a mesh, made once, and the links over them
``join``                joins the job that a launcher describes: makes its process group
``links``               collectives over one process group, prepared once, then run at once or started early
``message_algorithms``  algorithms of collectives made of point-to-point messages
``messages``            building blocks of collectives made of gloo's direct messages
``moves``               redistributions as differentiable functions of local tensors
``mpi``                 MPI as the carrier of tensors: messages and requests of communicators, waited for with a timeout
``mpi_algorithms``      collectives of MPI as algorithms beside our own
``operations``          communication that is under way, finished in the order in which it began
``places``              computes where received pieces go in the tensor that they make up
``shared_steps``        moves of several tensors that travel in one message
``starts``              moves that are started early on one rank, and ended one by one where their results are read
``steps``               the steps of a redistribution on one rank's tensor: the collectives of the distributed world
``store``               the store where the ranks of a job meet, and which of them do not come
``transfer``            sends every region straight to the ranks that need it, without copies where possible
``world``               this process as one rank of a real job, with collectives over ``torch.distributed``
======================  ============================================================================================
"""
