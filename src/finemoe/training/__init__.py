"""Floor 3: one trainer, and the four slots that a method of training fills."""
