"""What becomes of a model: an adapter merged into its base, any model scored on held-out pairs, a run sent to the Hub.

Behind scripts/merge_adapter.py, scripts/score_pairs.py and scripts/push_run.py.
"""
