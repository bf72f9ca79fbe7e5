"""The report of one kind (load): figures, words and page together."""
