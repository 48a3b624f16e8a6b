"""What things cost on a machine: computing, communication, memory. Machines are data, in ``machines/``."""
