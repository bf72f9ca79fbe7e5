"""Floor 4: how good a model is at tasks, with intervals and with what was left out."""
