"""The heart: what an objective over pairs is, from rows of tokens to losses and metrics.

May touch every other wing; only the pipeline, and what stands in scripts/, touches this one.
"""
