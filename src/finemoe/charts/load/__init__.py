"""The report of `finemoe analyze load`."""
