"""Benchmarks of sglang_mosaic; each script also runs by path from the repository root."""
