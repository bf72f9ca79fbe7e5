"""The report of one kind (paper): figures, words and page together."""
