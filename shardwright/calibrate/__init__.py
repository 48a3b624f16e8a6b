"""Calibration: measures operators, collectives and whole steps, and fits a machine's numbers to them.

===============  ====================================================================================
``collectives``  every algorithm of every collective, and what operators take
``fit``          what a machine's numbers must be for prices to be the times that were measured
``models``       models whose steps are measured
``operators``    the machine that one runs on, from how long operators take here
``plans``        many different ones of the same model
``steps``        whole training steps, measured on real ranks: what a machine's numbers are fitted to
``timing``       seconds of steps that take turns, on a machine that others use too
===============  ====================================================================================
"""
