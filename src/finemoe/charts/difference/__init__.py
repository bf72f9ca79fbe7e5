"""The report of `finemoe analyze difference`."""
