"""Files of tensors: read without trust, written whole or not at all."""
