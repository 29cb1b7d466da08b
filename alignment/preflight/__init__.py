"""What a run would be, shown before it: its settings, rows, steps, memory and time. Nothing is trained, nothing is written."""
