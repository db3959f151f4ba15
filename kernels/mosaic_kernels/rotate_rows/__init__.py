"""Queries of new tokens in the bases of compressed pages."""
