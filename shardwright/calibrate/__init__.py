"""Calibration: measures operators, collectives and whole steps, and fits a machine's numbers to them.

===============  ====================================================================================
``collectives``  measures every algorithm of every collective, and then operators
``fit``          fits a machine's numbers so that prices match measured times
``models``       models whose steps are measured
``operators``    times operators, and fits the machine's numbers to the times
``plans``        many different plans of the same model
``steps``        measures whole training steps on real ranks, and fits the machine's numbers to them
``timing``       times steps that take turns, on a machine that others use too
===============  ====================================================================================
"""
