"""Memory: what one rank needs over a training step, operator by operator, predicted without running the step.

The local program of the first rank, which has the largest pieces, is played through on shapes: the forward makes tensors
and frees what nobody reads any more and autograd does not keep; the backward goes the other way, makes gradients, and
frees what was kept; the optimizer comes last. Memory is counted by storages, so that views, slices and moves of nothing
cost nothing and keep their base alive.

==================  ====================================================================================
``predict``         :func:`memory_of`, which puts the following together
``timeline``        the result: bytes in use while each operator runs
``training_step``   plays a step: forward, backward, optimizer
``calls``           plays local calls and their backward
``moves``           plays redistributions and their backward
``buckets``         plays moves that share collectives and start early
``rank_state``      what the rank has meanwhile: values, gradients, the tape of the backward
``recipes``         plays what is computed again in the backward
``usage``           the storages in use, and bytes by part
``local_call``      what one call makes, keeps and needs, found by running it on fake tensors
``local_tensor``    what a call sees of a tensor
``allocations``     counts what is allocated while a call runs
``fused_kernels``   calls that other devices than CPUs do in one kernel
==================  ====================================================================================
"""

from shardwright.plan.memory.predict import memory_of, step_memory
from shardwright.plan.memory.timeline import MemoryTimeline

__all__ = ["MemoryTimeline", "memory_of", "step_memory"]
