"""A program on global arrays as one device's program on its blocks."""
