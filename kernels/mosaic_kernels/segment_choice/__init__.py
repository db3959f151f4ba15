"""Rotated pages -> the format of every segment."""
