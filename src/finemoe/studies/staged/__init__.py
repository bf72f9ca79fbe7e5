"""A study of a recipe's stages: the whole recipe once a seed, every stage's model examined, and claims judged."""
