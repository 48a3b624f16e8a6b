"""Data for parallel nets: each rank reads what it hands in, in one global order, and goes on where it stopped."""

from shardwright.data.images import SlicePatches as SlicePatches
from shardwright.data.loading import Loader as Loader
from shardwright.data.make import loader as loader
