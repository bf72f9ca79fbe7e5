"""The report of `finemoe evaluate`."""
