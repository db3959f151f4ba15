"""Attention over given keys and values, with the log-sum-exp needed to merge it with other parts."""
