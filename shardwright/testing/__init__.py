"""Testing: proves rules by running them, and whole models against the single device.

==============  =======================================================================================
``difference``  the difference of two values, in units of their rounding
``rules``       proves rules by running them
``verify``      compares the parallel program with the single device, down to the first operator that differs
==============  =======================================================================================
"""

from shardwright.testing.rules import check_rule as check_rule
