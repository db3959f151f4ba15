"""Shared by the benchmarks: HTTP clients, server processes, statistics and reports. Nothing here imports sglang."""
