"""Data: batches for every rank, as slices or whole, in one order whatever the number of ranks.

============  ========================================================================================================
``cut``       which samples of a global batch a rank needs, and what of each collated tensor it hands in
``handed``    slices, whose global shapes all ranks together know
``images``    cutting an image into a grid of patches
``loading``   batches for a parallel net, of which every rank reads its own part, in one order, resumable at any batch
``make``      a loader from its arguments, checked before anything is read
``order``     which samples are in which global batch, and where in it a loader stands
``reader``    what turns requests for samples into what a rank hands in, in worker processes or in this one
``strategy``  how the tensors that a rank hands in are slices of the global ones
============  ========================================================================================================
"""

from shardwright.data.images import SlicePatches as SlicePatches
from shardwright.data.loading import Loader as Loader
from shardwright.data.make import loader as loader
