"""Pages as written -> rotated pages, by exact products of bytes."""
