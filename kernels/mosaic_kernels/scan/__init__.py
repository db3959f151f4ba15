"""Approximate logits of all tokens of compressed pages, from the base planes of K's leading channels."""
