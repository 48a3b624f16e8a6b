"""Jobs: reads what launchers say about the ranks.

==============  =====================================================================
``cluster``     reads the variables of a dynamic cluster (``MS_ROLE`` and the like)
``found``       finds the job, whichever launcher started this process
``job``         value that the readers return: a rank's place, and where ranks meet
``mpi``         reads the variables that mpirun sets
``rank_table``  reads a rank table, a JSON file
``slurm``       reads the variables that srun sets, and expands its lists of nodes
``torchrun``    reads the variables that torchrun sets
==============  =====================================================================
"""
