"""Attention of one query per request over pages that are not compressed."""
