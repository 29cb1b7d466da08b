"""What a person reads after a run: its card and its curves.

May touch alignment.errors and nothing else of alignment, so that a finished run can be read without what made it.
"""
