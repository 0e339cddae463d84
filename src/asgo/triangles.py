"""Deprecated name of `asgo.linalg.packed_symmetric`."""

import warnings

from asgo.linalg.packed_symmetric import pack, unpack

__all__ = ["pack", "unpack"]

warnings.warn("asgo.triangles is asgo.linalg.packed_symmetric now.", DeprecationWarning, stacklevel=2)
