"""How a parameter is read as a stack ``(b, m, n)`` of independent matrices.

A `View` is data, not code: an einops pattern from the parameter's axes to ``b m n``, the sizes of the axes
that the shape alone does not give, and an uneven split for parameters that hold several matrices side by side
(a fused query-key-value projection). Rows (``m``) are output features, columns (``n``) input features, as in
`torch.nn.Linear.weight`. Per-head, per-expert, blockwise and convolutional preconditioning are views of one
optimizer, not optimizers of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from einops import EinopsError, rearrange
from torch import Tensor

_AXIS = re.compile(r"\(([^)]*)\)|(\S+)")
JOINT = "several"  # the axis along which equal parts of several parameters are stacked


@dataclass(frozen=True)
class View:
    """A parameter read as one or more stacks of matrices.

    Args:
        pattern: einops pattern to three axes ``b m n``, e.g. ``"(h d) n -> h d n"``. With `split`, one pattern
            for all parts or one per part.
        sizes: lengths of axes that the shape does not determine, e.g. ``{"h": 12}``.
        split: lengths of the parts along `split_dim`; ``None`` keeps the parameter whole. Every part is
            preconditioned and rescaled as if it were a parameter of its own.
        split_dim: the axis that `split` cuts: 0 for `torch.nn.Linear`, 1 for layers that store the transpose.
        repeated: whether the axis holds the parts again and again, such as query, key and value of every group of
            heads. `split` then has their lengths in one repetition, and the patterns read the repetitions as an axis
            before the one that is cut: ``"g m n -> 1 (g m) n"``.

    Raises:
        ValueError: for a pattern that is not einops', or a number of patterns other than one or one per part.

    >>> View("(h d) n -> h d n", {"h": 2}).shapes((6, 5))
    [(2, 3, 5)]
    """

    pattern: str | tuple[str, ...]
    sizes: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    split: tuple[int, ...] | None = None
    split_dim: int = 0
    repeated: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        sizes = self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes
        set_field(self, "sizes", tuple(sorted((str(axis), int(size)) for axis, size in sizes)))
        if not isinstance(self.pattern, str):
            set_field(self, "pattern", tuple(self.pattern))
        if self.split is not None:
            set_field(self, "split", tuple(int(part) for part in self.split))
        parts = 1 if self.split is None else len(self.split)
        if not isinstance(self.pattern, str) and len(self.pattern) != parts:
            raise ValueError(
                f"view {self.pattern} has {len(self.pattern)} patterns for {parts} parts: pass one pattern, "
                "or one per entry of split."
            )
        for pattern in {self.pattern} if isinstance(self.pattern, str) else set(self.pattern):
            if pattern.count("->") != 1:
                raise ValueError(
                    f"view {pattern!r} is not a pattern: write the parameter's axes, '->' and three axes "
                    "b m n, as in 'm n -> 1 m n'."
                )

    @staticmethod
    def of(spec: View | str | Mapping[str, Any] | None) -> View | None:
        """The view that `spec` describes: a `View`, a pattern, the plain dict of `to_dict`, or ``None``."""
        if spec is None or isinstance(spec, View):
            return spec
        if isinstance(spec, str):
            return View(spec)
        if isinstance(spec, Mapping) and "pattern" in spec:
            unknown = set(spec) - {"pattern", "sizes", "split", "split_dim", "repeated"}
            if not unknown:
                return View(**{"sizes": (), **spec})
        raise ValueError(
            f"view {spec!r} is not understood: pass a View, an einops pattern such as 'm n -> 1 m n', "
            "or None for AdamW."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``param_groups``: only types that ``torch.load(weights_only=True)`` accepts."""
        pattern = self.pattern if isinstance(self.pattern, str) else list(self.pattern)
        split = None if self.split is None else list(self.split)
        repeated = {"repeated": True} if self.repeated else {}
        return {"pattern": pattern, "sizes": dict(self.sizes), "split": split, "split_dim": self.split_dim} | repeated

    @property
    def parts(self) -> int:
        """How many parts `split` makes: 1 without a split."""
        return 1 if self.split is None else len(self.split)

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """The parts of `x` along `split_dim`, as views that share its memory; with `repeated`, one axis more."""
        if self.split is None:
            return (x,)
        if not self.repeated:
            return x.split(list(self.split), self.split_dim)
        dim, unit = self.split_dim % x.ndim, sum(self.split)
        return x.unflatten(dim, (x.shape[dim] // unit, unit)).split(list(self.split), dim + 1)

    def stack(self, part: int, x: Tensor) -> Tensor:
        """Part number `part`, read as ``(b, m, n)``; shares memory with `x` where strides allow."""
        pattern = self.pattern_of(part)
        return rearrange(x, pattern, **lengths(pattern.split("->")[0], tuple(x.shape), self._sizes))

    def unstack(self, part: int, stack: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `stack` for a part of the given shape."""
        source, target = self.pattern_of(part).split("->")
        return rearrange(stack, f"{target} -> {source}", **lengths(source, tuple(shape), self._sizes))

    def stack_all(self, part: int, xs: Sequence[Tensor]) -> Tensor:
        """Part number `part` of several parameters, equal in shape, read as one stack ``(len(xs) b, m, n)``.

        A copy, in the memory order of the parts where a stack can have it; a single part is not copied.
        """
        if len(xs) == 1:
            return self.stack(part, xs[0])
        source, target = self._joint(part)
        sizes = lengths(self.pattern_of(part).split("->")[0], tuple(xs[0].shape), self._sizes)
        return rearrange(torch.stack(list(xs)), f"{source} -> {target}", **sizes)

    def unstack_all(self, part: int, stack: Tensor, shape: Sequence[int], count: int) -> Sequence[Tensor]:
        """The inverse of `stack_all` for `count` parts of the given shape."""
        source, target = self._joint(part)
        sizes = lengths(self.pattern_of(part).split("->")[0], tuple(shape), self._sizes)
        return rearrange(stack, f"{target} -> {source}", **{JOINT: count, **sizes}).unbind()

    def matrices(self, x: Tensor) -> list[Tensor]:
        """All stacks ``(b, m, n)`` of a parameter, one per part."""
        return [self.stack(i, part) for i, part in enumerate(self.cut(x))]

    def restore(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of `matrices`: a tensor of the parameter's shape."""
        shapes = [part.shape for part in self.cut(torch.empty(tuple(shape), device="meta"))]
        parts = [self.unstack(i, stack, shapes[i]) for i, stack in enumerate(stacks)]
        if self.split is None:
            return parts[0]
        dim = self.split_dim % len(shape)
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1) if self.repeated else torch.cat(parts, dim)

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """The shapes ``(b, m, n)`` of the stacks of a parameter of this shape.

        Raises:
            ValueError: if the view does not fit, saying which axis and what would.
        """
        return list(_shapes(self, tuple(shape)))

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise `ValueError`, naming the parameter, if a parameter of this shape cannot be read this way."""
        try:
            self.shapes(shape)
        except ValueError as error:
            raise ValueError(
                f"view {self} does not fit {name!r} {tuple(shape)}: {error}. Pass sizes or a split that fit, "
                f"or route it with {_fallback(len(shape))}."
            ) from None

    def __str__(self) -> str:
        patterns = (self.pattern,) if isinstance(self.pattern, str) else self.pattern
        runs = [(pattern, len(list(run))) for pattern, run in groupby(patterns)]
        pattern = " | ".join(repr(pattern) + (f" x{count}" if count > 1 else "") for pattern, count in runs)
        notes = [f"{axis}={size}" for axis, size in self.sizes]
        if self.split is not None:
            notes.append(f"split={self.split}" + (f" on dim {self.split_dim}" if self.split_dim else ""))
        if self.repeated:
            notes[-1] += ", repeated"
        return pattern + (" with " + ", ".join(notes) if notes else "")

    @property
    def _sizes(self) -> tuple[tuple[str, int], ...]:
        return self.sizes if isinstance(self.sizes, tuple) else tuple(self.sizes.items())

    def _joint(self, part: int) -> tuple[str, str]:
        """Both sides of the pattern for several parameters: a new first axis, merged into the stack's first."""
        source, target = self.pattern_of(part).split("->")
        first, *rest = map(" ".join, axes_of(target))
        return f"{JOINT} {source}", f"({JOINT} {first}) {' '.join(f'({axes})' for axes in rest)}"

    def pattern_of(self, part: int) -> str:
        """The pattern of part number `part`."""
        return self.pattern if isinstance(self.pattern, str) else self.pattern[part]


@lru_cache(maxsize=4096)
def _shapes(view: View, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    x = torch.empty(shape, device="meta")
    if view.split is not None:
        if not -len(shape) <= view.split_dim < len(shape):
            raise ValueError(f"there is no dim {view.split_dim}")
        total, length = sum(view.split), shape[view.split_dim]
        if view.repeated and (not total or length % total):
            raise ValueError(f"the repeated split adds up to {total}, which does not divide {length}")
        if not view.repeated and total != length:
            raise ValueError(f"the split adds up to {total}, not {length}")
    try:
        stacks = [tuple(stack.shape) for stack in view.matrices(x)]
    except EinopsError as error:
        raise ValueError(str(error).strip().splitlines()[-1].strip().rstrip(".")) from None
    for stack in stacks:
        if len(stack) != 3:
            raise ValueError(f"it gives {len(stack)} axes {stack}, not three axes b m n")
    return tuple(stacks)  # pyright: ignore[reportReturnType]


def axes_of(side: str) -> list[list[str]]:
    """The names within every axis of one side of a pattern."""
    return [(match[1] if match[1] is not None else match[2]).split() for match in _AXIS.finditer(side)]


@lru_cache(maxsize=4096)
def lengths(source: str, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """The length of every named axis on the left of a pattern, for a part of this shape."""
    if len(axes_of(source)) != len(shape):
        raise ValueError(f"the pattern reads {len(axes_of(source))} axes, the parameter has {len(shape)}")
    known, found = dict(sizes), {}
    for names, length in zip(axes_of(source), shape, strict=True):
        named = [name for name in names if not name.isdigit()]
        free = [name for name in named if name not in known]
        product = math.prod(known[name] for name in named if name in known)
        if len(free) > 1:
            raise ValueError(f"the sizes of {', '.join(free)} are not given")
        if product == 0 or (free and length % product) or (not free and named and length != product):
            relation = "a multiple of" if free else "equal to"
            raise ValueError(f"{length} is not {relation} {product}")
        found |= {name: known.get(name, length // product) for name in named}
    return found


def _fallback(ndim: int) -> str:
    if ndim == 2:
        return "'m n -> 1 m n'"
    return "a view of its own" if ndim > 2 else "view=None (AdamW)"
