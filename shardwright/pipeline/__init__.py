"""Pipelines: a model becomes stages on disjoint sets of devices, and micro-batches stream through them.

==============  ==================================================================================
``schedules/``  in which order each rank runs its stages' work: named, searched, checked, and timed
==============  ==================================================================================
"""
