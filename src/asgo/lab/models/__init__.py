"""Models with random weights, built from a shape and a seed."""
