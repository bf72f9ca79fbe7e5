"""Before a run: what it takes, a recipe to begin with, how large a model is, what this machine is."""
