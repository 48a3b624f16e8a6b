"""Parameters: distributed over the ranks, entered into programs, updated by optimizers, made where they are needed.

===============  ====================================================================================================
``alike``        runs operators on tensors that lie alike on what a rank holds of them, fast
``beside``       lets gradients pass between ordinary and distributed tensors, and refuses plain calls of distributed models
``delayed/``     parameters that are made on the ranks that hold them, and nowhere else
``device_mesh``  converts our meshes to torch's, and registers them for the checks in ``dtensors``
``distribute``   gives each rank its piece of every parameter, and nobody the whole
``dtensors``     makes distributed tensors in the user's own code behave as the whole ones, or refuses
``enter``        gives programs the local tensors of distributed parameters
``found_inf``    makes loss scaling find infinite gradients on all ranks or on none
``handles``      parameters that a model held before they were distributed, and what they are now
``norm``         the norm of all gradients and clipping by it, over parameters of any layouts
``operators``    runs operators of the user's own code on pieces or on whole values
``optimizer``    binds optimizers to the distributed parameters and runs their steps on local tensors
``ours``         tells our distributed tensors from others, and what views of them were made of
``placements``   converts layouts to DTensor placements, and back
``places``       tells how distributed tensors lie, fast
``stages``       distributes parameters over the ranks of the stages that read them
``whole``        gathers whole values of parameters, or materialises those that are delayed
``whole_module`` gives a module whole ordinary parameters for a while
===============  ====================================================================================================
"""
