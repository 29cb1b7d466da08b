"""The policy, given as a path: loaded, adapted, and asked for log-probabilities of response tokens.

Knows nothing of data sets or of objectives; may touch recipe and the wings before it.
"""
