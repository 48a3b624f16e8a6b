"""Launching: processes on this machine, and jobs on Kubernetes.

===============  ==================================================
``kubernetes/``  manifests of jobs: read, rendered, checked
``local``        starts processes on this machine, one per rank
===============  ==================================================
"""
