"""The only definitions of TTFT, TPOT, TBT, goodput and percentiles."""
