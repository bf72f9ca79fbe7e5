"""The report of one kind (comparison): figures, words and page together."""
