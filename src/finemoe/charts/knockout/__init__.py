"""The report of `finemoe analyze knockout`."""
