"""What a run folder says about its run: curves, and what to make of them."""
