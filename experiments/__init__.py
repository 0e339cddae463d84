"""Experiments of papers, repeated: each is run from a clone by ``python -m experiments.NAME``."""
