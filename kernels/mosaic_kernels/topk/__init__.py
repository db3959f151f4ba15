"""Per-vector important elements: the largest channels of every token, values and bitmap (arXiv 2607.00760)."""
