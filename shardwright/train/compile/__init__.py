"""Compilation: the calls between moves as functions that ``torch.compile`` makes.

==============  ===============================================================================================
``compilable``  which calls of a local program may be compiled, and which are worth it
``compiler``    the local calls between moves as functions that ``torch.compile`` makes; moves stay as they are
``draws``       which calls take numbers from the generator, and dropout as two calls of which only one does
``reach``       which outputs of a program the gradients of a value come from
``segment``     calls written as one function of local tensors, which is compiled when it is first called
``segments``    runs of local calls between moves, to be compiled as one function each
==============  ===============================================================================================
"""
