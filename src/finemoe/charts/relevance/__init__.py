"""The report of one kind (relevance): figures, words and page together."""
