"""The report of one kind (knockout): figures, words and page together."""
