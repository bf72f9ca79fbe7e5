"""The report of one kind (cards): figures, words and page together."""
