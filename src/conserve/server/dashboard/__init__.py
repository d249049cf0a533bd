"""The live page, its feed, and the figures behind them."""
