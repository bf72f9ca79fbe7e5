"""Floor 0: configuration, errors, logs, random streams and memory. Imports nothing else of the project."""
