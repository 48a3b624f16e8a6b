"""Capture: the user's callable as a graph, and all that a graph cannot hold refused.

===================  ==================================================================================================
``attributes``       the names that ``add_prim_attr`` knows and the values they may have
``backward_hooks``   backward hooks of modules, refused: a captured program would never call them
``caches``           the key-value caches of Hugging Face models as containers of tensors, so that models can return them
``capture``          a callable to a Graph, by ``torch.export`` without decomposition
``closure``          the modules and parameters that a function reads from outside, held by one module
``converter``        an exported program as a graph of ours
``emitter``          appends operators to the graph that is being made, and keeps the value that each tensor has now
``fakes``            shapes of a module's state and inputs, without their values, for the capture
``functionalise``    rewrites in-place operators so that every value is made once and never changed
``fx_nodes``         parts of fx nodes: their arguments, the tensors they make, the modules around them
``left_behind``      Python values that the captured callable changed, undone, to be carried out in every call
``names``            readable, unique names for the values and nodes of a graph
``python_state``     everything besides its arguments that a captured callable reads
``random_states``    numbers that a captured callable draws beside torch's operators, found and refused
``refusals``         errors for what a captured callable does and a graph cannot hold, at the user's line
``repeated``         a few copies are captured, the graph of all is made from these
``resolve_marks``    found out once the graph stands
``runs``             rows of equal modules in the lists of a model, and the model with fewer of each
``session``          puts marks onto the operators that run while a callable is captured
``stand_ins``        stand in for parts of torch that are no torch functions
``strides``          the memory order of what an operator makes, where the shape functions of torch say another
``torch_functions``  sees every torch function that is called, and refuses what a graph cannot keep
``watch``            finds, while a callable is captured, what it does that a graph cannot keep
``writes``           makes the in-place operators of an exported program functional
===================  ==================================================================================================
"""
