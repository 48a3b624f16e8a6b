"""Jobs on Kubernetes: from a job of roles to manifests for a cluster, checked before anything is sent there.

===============  ===========================================================================================
``checks``       checks mappings key by key: unknown keys, types, allowed values
``dockerfile``   a Dockerfile whose image runs a script
``environment``  what is injected into the containers of each role
``explain``      what a job becomes on a cluster, as text
``job``          a job of roles: values alone
``msjob``        reads the job of roles from the YAML that MindSpore's operator takes
``pods``         the pods of a role: its template with what is injected
``render``       manifests: a JobSet, a TrainJob with its runtime, or an Indexed Job with a headless service
``schemas``      checks manifests against the schemas of custom resources, unknown keys refused
===============  ===========================================================================================
"""
