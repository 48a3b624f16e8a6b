"""Predicts the memory of one rank over a training step, without running the step.

The local program of the first rank, which has the largest pieces, is simulated on shapes: the forward makes tensors
and frees those that nobody reads any more and autograd does not keep; the backward goes the other way, makes gradients, and
frees what was kept; the optimizer comes last. Memory is counted by storages, so that views, slices and moves of nothing
cost nothing and keep their base alive.

==================  ====================================================================================
``predict``         :func:`memory_of`, which puts the following together
``timeline``        the result: bytes in use while each operator runs
``training_step``   simulates a step: forward, backward, optimizer
``calls``           simulates local calls and their backward
``moves``           simulates redistributions and their backward
``buckets``         simulates moves that share collectives and start early
``rank_state``      the state of the rank: values, gradients, the tape of the backward
``recipes``         simulates what is computed again in the backward
``usage``           the storages in use, and bytes by part
``local_call``      runs one call on fake tensors to find what it makes, keeps and needs
``local_tensor``    shape, strides and dtype of a tensor that a local call reads
``allocations``     counts what is allocated while a call runs
``fused_kernels``   calls that other devices than CPUs do in one kernel
==================  ====================================================================================
"""

from shardwright.plan.memory.predict import memory_of, step_memory
from shardwright.plan.memory.timeline import MemoryTimeline

__all__ = ["MemoryTimeline", "memory_of", "step_memory"]
