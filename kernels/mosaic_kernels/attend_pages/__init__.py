"""Attention of one query over all tokens of compressed pages, straight from their bytes."""
