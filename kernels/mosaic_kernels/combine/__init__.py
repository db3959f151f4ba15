"""Joins what the pieces of a step found, and what dense pages gave, into the output of attention."""
