"""The layer under the scripts: one preference pair's way from a recipe to a gradient. See README.md for a map."""
