"""What gradients and curvature of a model look like."""
