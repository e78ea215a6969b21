"""Models of any shape with random weights."""
