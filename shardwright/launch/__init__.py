"""Launching: processes on this machine and others, and jobs on Kubernetes.

===============  ========================================================================
``kubernetes/``  manifests of jobs: read, rendered, checked
``background``   starts a job that goes on when its launcher returns
``binding``      cores and NUMA nodes for ranks
``engine``       runs one node's ranks under torch's elastic agent, and reports failures
``job``          value that describes one node's part of a job
``local``        starts processes on this machine, one per rank, for calibration
``logs``         files of ranks' output and of the launcher's, and last words of a rank
``meeting``      brings the launchers of all nodes together
``report``       words for a failure: the first rank, how it ended, what it said
``worker``       becomes a rank's program, bound to its cores and to its launcher's life
===============  ========================================================================
"""
