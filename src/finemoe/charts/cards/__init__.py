"""The report of `finemoe analyze experts`: a card for each expert."""
