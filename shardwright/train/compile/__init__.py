"""Compilation: the calls between moves as functions that ``torch.compile`` makes.

==============  ===============================================================================================
``compilable``  decides which calls of a local program may be compiled, and which are worth it
``compiler``    compiles the local calls between moves with ``torch.compile``; moves stay as they are
``draws``       finds calls that use the generator, and splits dropout so that only one of two calls does
``reach``       finds the outputs of a program that the gradients of a value come from
``segment``     writes calls as one function of local tensors, which is compiled when it is first called
``segments``    finds runs of local calls between moves, to be compiled as one function each
==============  ===============================================================================================
"""
