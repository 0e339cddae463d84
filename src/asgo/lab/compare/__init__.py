"""Optimizers over seeds, and what the differences are worth."""
