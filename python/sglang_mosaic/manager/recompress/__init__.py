"""Frames that nobody attends to, made smaller: coarser codes as far as an error limit allows, then entropy coding."""
