"""Agreement: what the processes of a job tell each other, so that those that do different things find out.

================  ===================================================================================================
``checksum``      a number, or a few, that tell whether ranks hold the same tensor
``numbers``       what every rank says in a few numbers, told to all of them
``random_state``  what makes masks drawn on every rank the same
``signature``     what a call of a net is, in words that the ranks of a job compare
``verdict``       what the events of several ranks differ in, in words
``watch``         ranks of a job tell each other what they are doing, so that those that do different things find out
================  ===================================================================================================
"""
