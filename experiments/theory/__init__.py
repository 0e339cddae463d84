"""Convex problems on which every quantity of the regret bounds is computed, and the bounds beside the regret."""
