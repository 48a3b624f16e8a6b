"""Pipelines: a model in stages on ranks of their own, through which micro-batches pass."""
