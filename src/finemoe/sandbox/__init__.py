"""Floor 1: programs that a model wrote, run in a process of their own."""
