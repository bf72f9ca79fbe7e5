"""A server under load: nothing lost, nothing mixed up, nothing that grows."""
