"""Parameters: distributed over the ranks, entered into programs, updated by optimizers, made where they are needed.

===============  ====================================================================================================
``delayed/``     parameters that are made on the ranks that hold them, and there alone
``device_mesh``  ours as torch's, whose distributed tensors are watched
``distribute``   each rank holds its piece, and nothing keeps the whole
``dtensors``     distributed tensors in the user's own code: what would be one rank's part of the truth is made right
``enter``        distributed parameters as the local tensors that a program reads
``found_inf``    whether any gradient is infinite is found on all ranks or on none
``handles``      parameters that a model held before they were distributed, and what they are now
``norm``         the norm of all gradients and clipping by it, over parameters of any layouts
``optimizer``    bound to the distributed parameters, their steps run on local tensors
``placements``   layouts as DTensor placements, and back
``whole``        gathered from their pieces, or materialised where they are still delayed
===============  ====================================================================================================
"""
