"""Floor 1: the model. Pure torch, one device, no files."""
