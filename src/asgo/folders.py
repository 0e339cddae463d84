"""Deprecated name of `asgo.checkpoint.sharded`."""

import warnings

from asgo.checkpoint.sharded import load, save, save_async

__all__ = ["load", "save", "save_async"]

warnings.warn("asgo.folders is asgo.checkpoint.sharded now.", DeprecationWarning, stacklevel=2)
