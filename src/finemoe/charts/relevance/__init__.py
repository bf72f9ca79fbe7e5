"""The report of `finemoe analyze relevance`."""
