"""Between the tensors of a file and the tensors of a model."""
