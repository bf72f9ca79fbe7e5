"""Floor 5: the program of a training run, from recipe to summary."""
