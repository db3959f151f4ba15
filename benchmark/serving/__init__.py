"""Benchmarks that measure a running server over HTTP."""
