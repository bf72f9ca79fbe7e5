"""The report of `finemoe paper`."""
