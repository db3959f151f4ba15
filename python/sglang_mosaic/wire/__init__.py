"""What crosses the border between a server and its manager process: small messages, and slots of shared memory.

Knows no store, no codec and no socket: bytes in, objects out, and `WireError` for everything else.
"""
