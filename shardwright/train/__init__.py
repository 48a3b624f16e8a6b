"""What training at scale needs beyond a plan: one feature a file."""
