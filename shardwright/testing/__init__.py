"""Testing: proves rules by running them, and whole models against the single device.

==============  =======================================================================================
``difference``  how far two values are apart, in units of their rounding
``rules``       proves rules by running them
``verify``      the parallel program against the single device, down to the first operator that differs
==============  =======================================================================================
"""

from shardwright.testing.rules import check_rule as check_rule
