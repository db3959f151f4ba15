"""What the codecs lose on real K and V, and what they cost."""
