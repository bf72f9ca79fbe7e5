"""Floor 3: one trainer, and what a way of training fills in."""
