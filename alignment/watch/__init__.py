"""While a run trains: warnings, once each, with what to do; and replies to fixed prompts.

Only of what is there anyway: the log, and what evaluations score.
"""
