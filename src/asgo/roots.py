"""Deprecated name of `asgo.linalg.inverse_root`."""

import warnings

from asgo.linalg.inverse_root import ROOTS, check_eps, products

__all__ = ["ROOTS", "check_eps", "products"]

warnings.warn("asgo.roots is asgo.linalg.inverse_root now.", DeprecationWarning, stacklevel=2)
