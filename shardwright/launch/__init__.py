"""Launching: processes on this machine.

=========  ==============================================
``local``  starts processes on this machine, one per rank
=========  ==============================================
"""
