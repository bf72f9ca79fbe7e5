"""The report of one kind (difference): figures, words and page together."""
