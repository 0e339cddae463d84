"""Matrix products of a step: their precision, which half of them is needed, and in which memory order.

Whatever precision the training script chose, a product of ours has the precision that its error allows:

===========================  ==========  ==================================================================
product                      precision   error of the step that a lower one would cost (eps 1e-6)
===========================  ==========  ==================================================================
statistic ``S S^T``          float32     TF32 1e-2, bfloat16 9e-2
first that makes Y           float64     float32 4e-3 (see `asgo.linalg.polynomial`)
others inside the root       float32     three bfloat16 products 2e-3; TF32 and bfloat16 fail (TF32 at eps 1e-5 2e-2)
direction ``Z D``            float32     TF32 1e-2, bfloat16 9e-2
===========================  ==========  ==================================================================

Against float64, with factors rounded to the lower precision (``tests/linalg/test_roots.py`` measures it); as they
run here it is about 2e-3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Square: TypeAlias = Float[Tensor, "b k k"]

Precision: TypeAlias = Literal["ieee", "tf32", "bf16x3", "double"]

PANELS = 4  # of a symmetric product: 5/8 of the work; more panels are too thin to be fast
SMALLEST_PANEL = 48


class _Settings:
    """torch's precision of matrix products, which all threads share, while any of them is inside `exact_matmul`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted: dict[int, list[str]] = {}
        """What each thread that is inside asked for, the innermost last."""
        self.before: list[str] = []

    def enter(self, precision: str) -> None:
        with self.lock:
            if not self.wanted:
                self.before = [backend.fp32_precision for backend in _backends()]
            self.wanted.setdefault(threading.get_ident(), []).append(precision)
            self._apply()

    def leave(self) -> None:
        with self.lock:
            mine = self.wanted[threading.get_ident()]
            mine.pop()
            if not mine:
                del self.wanted[threading.get_ident()]
            if self.wanted:
                self._apply()
            else:
                self._restore()

    def _apply(self) -> None:
        """The precision that all threads can do with."""
        cuda, mkldnn = _backends()
        cuda.fp32_precision = "tf32" if all(asked[-1] == "tf32" for asked in self.wanted.values()) else "ieee"
        mkldnn.fp32_precision = "ieee"

    def _restore(self) -> None:
        for backend, before in zip(_backends(), self.before, strict=True):
            backend.fp32_precision = "none"  # inherit, as an inherited value should not become a fixed one
            if backend.fp32_precision != before:
                backend.fp32_precision = before


_settings = _Settings()


def _backends() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def exact_matmul(device: torch.device, precision: Literal["ieee", "tf32"] = "ieee") -> Iterator[None]:
    """Matrix products in full precision inside; the caller's settings are as before outside.

    Otherwise ``torch.set_float32_matmul_precision("high")`` spoils an iterative root on CUDA, ``"medium"`` every root
    on CPUs with bfloat16 matrix units (AMX; AVX512-BF16 alone is not used for float32 products), and autocast both.

    The settings belong to the process. While any thread is inside, products of all threads are exact; the last one to
    leave restores what the first one found. TF32 products need all that are inside to ask for them.
    """
    known = torch.amp.is_autocast_available(device.type)
    _settings.enter(precision)
    try:
        with torch.autocast(device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        _settings.leave()


def gram(X: Float[Tensor, "b k n"]) -> Square:
    """``X X^T``, exactly symmetric on every machine: its lower triangle, mirrored.

    A product alone is not: the order of its sums depends on where an entry stands. Panels of rows times the rows down
    to them, so that larger matrices take less time than the plain product.
    """
    k = X.shape[1]
    panels = max(1, min(PANELS, k // SMALLEST_PANEL))
    if panels == 1:
        return _mirrored(X @ X.mT)
    result = X.new_empty(len(X), k, k)
    cuts = [k * i // panels for i in range(panels + 1)]
    for start, stop in pairwise(cuts):
        left, corner = (X[:, start:stop] @ X[:, :stop].mT).tensor_split([start], 2)
        result[:, start:stop, :start] = left
        result[:, :start, start:stop] = left.mT
        result[:, start:stop, start:stop] = _mirrored(corner)
    return result


def _mirrored(S: Square) -> Square:
    """The lower triangle and its mirror image."""
    i = torch.arange(S.shape[-1], device=S.device)
    return torch.where(i[:, None] >= i, S, S.mT)


def times(A: Square, X: Float[Tensor, "b k n"]) -> Float[Tensor, "b k n"]:
    """``A X`` in the memory order of X, so that what follows runs along memory."""
    if X.is_contiguous() or not X.mT.is_contiguous():
        return A @ X
    return (X.mT @ A.mT).mT


def baddbmm(C: Square, A: Square, B: Square, c: float, ab: float, precision: Precision) -> Square:
    """``c C + ab A B``.

    With "bf16x3" every factor is the sum of two bfloat16 numbers and the product of the two small parts is left
    out, accumulated in float32: one product of three times the inner length on tensor cores, nearly float32. With
    "double" the product is computed in float64 and rounded to A's dtype.
    """
    if A.dtype != torch.float32 or precision not in ("double", "bf16x3"):
        return torch.baddbmm(C, A, B, beta=c, alpha=ab)
    product = torch.bmm(A.double(), B.double()).float() if precision == "double" else _three_halves(A, B)
    product = product if ab == 1 else product.mul_(ab)
    return product.add_(C, alpha=c) if c else product


def _three_halves(A: Square, B: Square) -> Square:
    (high, low), (other_high, other_low) = _halves(A), _halves(B)
    left, right = torch.cat([high, high, low], -1), torch.cat([other_high, other_low, other_high], -2)
    if A.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # no such product there: the same numbers, slower


@cache
def has_fast_double(device: torch.device) -> bool:
    """Whether a float64 product takes at most about twice as long as one in float32.

    It does on CPUs, and by published rates on NVIDIA's A100, H100, H200 and B200; on others it takes up to 64 times as
    long.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0)}
    return device.type == "cpu"


def _halves(X: Tensor) -> tuple[Tensor, Tensor]:
    high = X.bfloat16()
    return high, (X - high).bfloat16()
