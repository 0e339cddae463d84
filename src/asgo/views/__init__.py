"""How parameters are read as stacks of matrices: the view, its named patterns, and what `routing` decides."""

from asgo.views.patterns import (
    MATRIX,
    STACK,
    TRANSPOSED,
    blocks,
    conv,
    default_view,
    fused,
    fused_qkv,
    head_columns,
    heads,
)
from asgo.views.view import View, axes_of, lengths

__all__ = [
    "MATRIX",
    "STACK",
    "TRANSPOSED",
    "View",
    "axes_of",
    "blocks",
    "conv",
    "default_view",
    "fused",
    "fused_qkv",
    "head_columns",
    "heads",
    "lengths",
]
