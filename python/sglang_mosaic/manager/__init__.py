"""The manager: a CPU process that keeps evicted pages, compresses them further, brings them back and calibrates.

`client.py` has the contract that a server sees; everything behind it may die at any moment and costs hits, never
requests. Imports neither torch nor sglang: only the jobs that need torch load it, in a process of their own.
"""
