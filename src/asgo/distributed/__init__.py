"""Optimizers on several ranks: where parameters are, who works on what, and what travels between them."""
