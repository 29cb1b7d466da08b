"""Many runs as one experiment: a matrix of recipes, run, compared and decided upon.

A cell is a run; an axis is what is varied; a value of an axis is a bundle of recipe keys with a name.
"""
