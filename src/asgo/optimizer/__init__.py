"""The step that all optimizers of the library share."""

from asgo.optimizer.step import StructuredOptimizer

__all__ = ["StructuredOptimizer"]
