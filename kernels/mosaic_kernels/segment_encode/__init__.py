"""K and V of whole pages -> the bytes of compressed segments."""
