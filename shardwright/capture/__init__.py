"""Capture: the user's callable as a graph, and all that a graph cannot hold refused.

===================  ==================================================================================================
``attributes``       the names that ``add_prim_attr`` knows and the values they may have
``backward_hooks``   refuses old-style backward hooks of modules
``caches``           the key-value caches of Hugging Face models as containers of tensors, so that models can return them
``capture``          a callable to a Graph, by ``torch.export`` without decomposition
``checked_losses``   losses that look at values first, within torch
``closure``          the modules and parameters that a function reads from outside, held by one module
``converter``        converts an exported program to a ``Graph``
``cumulative_norm``  batch norms without a momentum, whose statistics are the means over all batches
``data``             assignments to ``tensor.data``
``decisions``        what Python decides by values of tensors, assumed and compared in every call
``derivatives``      derivatives that the callable takes itself, by ``torch.autograd.grad``, as operators
``emitter``          appends operators to the graph that is being made, and keeps the current value of each tensor
``fakes``            shapes of a module's state and inputs, without their values, for the capture
``functionalise``    finds functional forms of in-place operators and of writes through views
``fx_nodes``         parts of fx nodes: their arguments, the tensors they make, the modules around them
``left_behind``      undoes what the captured callable assigned in Python; every call of the program then assigns it
``names``            readable, unique names for the values and nodes of a graph
``numbers``          numbers that change in every step, as inputs of the program
``own_backward``     records the user's functions and hooks with their own backward as opaque operators
``padded_encoder``   what ``nn.TransformerEncoder`` and its layers compute of masked batches in evaluation
``python_state``     everything besides its arguments that a captured callable reads
``ragged``           tensors whose size depends on values, and what is computed of them, as opaque operators
``random_states``    numbers that a captured callable draws beside torch's operators, found and refused
``recorded``         what an export has recorded so far, and which of its nodes a tensor stands for
``refusals``         errors for what a captured callable does and a graph cannot hold, at the user's line
``repeated``         captures a few of many equal layers, and makes the graph of all from these
``resolve_marks``    puts marks onto the operators of the captured graph
``runs``             rows of equal modules in the lists of a model, and the model with fewer of each
``sequences``        packed sequences, recurrent networks on them and the CTC loss, each as one opaque operator
``session``          puts marks onto the operators that run while a callable is captured
``size_stand_ins``   what stands for tensors whose size depends on values, and refuses what it cannot do
``stand_ins``        replacements for parts of torch that are not torch functions
``state_keys``       how values of a Python state are compared
``strides``          the strides of operators' outputs where torch's shape functions are wrong about them
``torch_functions``  sees every torch function that is called, and refuses what a graph cannot keep
``transformations``  ``vmap``, ``grad``, ``vjp``, ``jvp`` of ``torch.func`` within the callable, as operators
``watch``            watches a callable while it is captured, and refuses what a graph cannot keep
``writes``           makes the in-place operators of an exported program functional
``written_out``      a function of tensors as the operators that it is made of, recorded by an export
===================  ==================================================================================================
"""
