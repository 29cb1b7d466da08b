"""A run that survives: its folder, its checkpoints, signals, bad steps, records, the Hub.

Knows nothing of pairs or of objectives; may touch data and the wings before it.
"""
