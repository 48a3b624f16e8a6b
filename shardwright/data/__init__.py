"""Data: batches for every rank, as slices or whole, in one order whatever the number of ranks.

===============  =====================================================================================================
``cut``          which samples of a global batch a rank reads, and which slices of collated tensors are its inputs
``images``       cuts an image into a grid of patches
``loading``      batches for a parallel net: each rank reads its own part, in one order, resumable at any batch
``make``         makes a loader from its arguments, which are checked before anything is read
``order``        which samples are in which global batch, and where in it a loader stands
``rank_inputs``  the global shapes and layouts of inputs of which each rank has a slice
``reader``       reads, collates and cuts the samples of a request, in worker processes or in this one
``strategy``     checks dataset strategies and turns them into layouts
===============  =====================================================================================================
"""

from shardwright.data.images import SlicePatches as SlicePatches
from shardwright.data.loading import Loader as Loader
from shardwright.data.make import loader as loader
