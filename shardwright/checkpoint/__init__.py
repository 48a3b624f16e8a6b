"""Checkpoints: what a training run holds, kept in safetensors files and a JSON index, for any number of ranks.

===========  ==========================================================================================
``folder``   folders of checkpoints: written beside, renamed when whole, the newest found
``load``     reads a checkpoint into a model and what trains it, or changes nothing
``pieces``   the pieces of tensors that ranks hold, and which of them writes each
``save``     writes a checkpoint, each slice once
``state``    names the tensors and plain values of a model and of what trains it
===========  ==========================================================================================
"""
