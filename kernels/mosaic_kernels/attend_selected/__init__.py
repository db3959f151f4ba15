"""Attention of one query over selected tokens of compressed pages."""
