"""The report of `finemoe plan`."""
