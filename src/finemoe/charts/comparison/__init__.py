"""The report of `finemoe compare`."""
