"""YAML and command line -> dataclasses, or one error that lists everything wrong with them.

Loads nothing that a recipe names; may touch launch and the wing before it.
"""
