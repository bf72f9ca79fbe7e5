"""The report of one kind (evaluation): figures, words and page together."""
