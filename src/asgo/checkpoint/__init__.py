"""Checkpoints: state by parameter name, in one file or in a folder that many processes write."""

from importlib import import_module
from typing import Any

from asgo.checkpoint.by_name import FORMAT, load_named_state_dict, named_state_dict
from asgo.checkpoint.files import load, save

__all__ = ["FORMAT", "load", "load_named_state_dict", "named_state_dict", "save", "sharded"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # torch.distributed.checkpoint takes longer to import than the rest of the library.
    if name == "sharded":
        return import_module("asgo.checkpoint.sharded")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
