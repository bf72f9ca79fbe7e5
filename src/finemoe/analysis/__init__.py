"""Floor 4: what the experts of a model learned, measured on labelled text."""
