"""Processes: what a launch asks for, the strategy that the libraries make of it, and whose turn it is.

Knows nothing of recipes, models or data; may touch alignment.errors and the wing before it, report.
"""
