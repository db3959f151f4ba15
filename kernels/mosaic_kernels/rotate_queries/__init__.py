"""Queries in the bases of the compressed pages that they meet."""
