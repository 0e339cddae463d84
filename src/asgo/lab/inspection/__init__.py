"""A model as an optimizer sees it: routing, gradients, advice."""
