"""What gradients and statistics look like while a model trains: spectra, noise, roots."""

from asgo.diagnostics.noise import Moments
from asgo.diagnostics.probe import GradientProbe
from asgo.diagnostics.sample import Sample
from asgo.diagnostics.spectra import effective_rank, nuclear_over_frobenius, singular_values, stable_rank

__all__ = [
    "GradientProbe",
    "Moments",
    "Sample",
    "effective_rank",
    "nuclear_over_frobenius",
    "singular_values",
    "stable_rank",
]
