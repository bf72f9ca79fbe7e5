"""The report of `finemoe show RUN --out`: one training run, while it trains and after."""
