"""Bytes of compressed segments -> K and V in the rotated bases."""
