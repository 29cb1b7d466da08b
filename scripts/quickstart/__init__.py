"""What the quickstart makes: its task, its model, and the two trainings on them."""
