"""What the Hessian block of one matrix is made of, from products of it with probes.

The block ``H`` of a matrix ``W`` of ``m x n`` acts on matrices of that shape. Shares of its squared Frobenius norm:

======  ===========================================================================  ====================
rows    in the blocks of one output neuron, a row of ``W``, with itself              structureless: 1/m
groups  in the blocks of one group of entries, such as a head, with itself           1 / number of groups
======  ===========================================================================  ====================

A group whose curvature is far larger than that of the others makes ``groups`` large by itself. ``coupling``, the root
mean square of ``||H_gh|| / sqrt(||H_gg|| ||H_hh||)`` over pairs of different groups, does not depend on that: 0 is
block-diagonal, 1 structureless.

and relative norms ``||P H||_F / ||H||_F`` of what is left of it after a projection:

======  ===========================================================================  ====================
left    on all ``S kron I``: columns of ``W`` do not interact, and are all alike     structureless: 1/n
right   on all ``I kron S``: rows of ``W`` do not interact, and are all alike        1/m
scalar  on all ``c I``, which are part of both                                       1 / (m n)
======  ===========================================================================  ====================

The last column is what a symmetric matrix of independent entries of one variance has.

`Exact` sums over a basis, `Probed` averages over random signs:

- ``E ||H v||^2 = ||H||^2`` and ``E (H v) v^T = H`` for a sign vector v, also where v is zero outside a group;
- for two such means A and B that are independent, ``E <P A, P B> = ||P H||^2`` for any projection P;
- if ``v`` and ``v'`` differ by a random sign for each row, and ``z, z'`` are the products with those signs taken
  off again, ``E <z, z'>`` is the squared norm within rows.

Everything is unbiased but for the ratio and the root taken at the end. Errors are jackknife standard errors over
independent sets of probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asgo._types import Stack

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SETS = 3
"""Fewest sets of probes: two to make a pair, and one more to be left out for the standard error."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, which is 0 where nothing was sampled."""

    value: float
    error: float = 0.0


Shares = dict[str, Estimate]
"""``rows``, ``groups`` and ``coupling`` (if there are groups), ``left``, ``right``, ``scalar``; and ``norm``."""


def units(m: int, n: int, start: int, stop: int) -> Stack:
    """The basis matrices from number `start` to before `stop`, row by row: ``(stop - start, m, n)``."""
    probes = torch.zeros(stop - start, m * n)
    probes[torch.arange(stop - start), torch.arange(start, stop)] = 1
    return probes.reshape(-1, m, n)


def signs(random: torch.Generator, *shape: int) -> Tensor:
    """Entries of +1 and -1, equally likely."""
    return torch.randint(0, 2, shape, generator=random).mul_(2).sub_(1).float()


def partial_traces(probes: Stack, products: Stack) -> tuple[Float[Tensor, "m m"], Float[Tensor, "n n"]]:
    """``sum_k Y_k V_k^T`` and ``sum_k Y_k^T V_k``: over a basis, the traces of ``H`` over columns and over rows.

    Args:
        probes: matrices ``V_k``.
        products: what the block makes of them, ``Y_k``.
    """
    left = torch.einsum("kin,kjn->ij", products, probes)
    return left, torch.einsum("kmi,kmj->ij", products, probes)


def squares_within(products: Stack, groups: Int[Tensor, "m n"], owners: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Of each product the squared norm in the group that its probe was in.

    Args:
        products: what the block makes of the probes.
        groups: the number of the group of every entry.
        owners: the number of the group of every probe.
    """
    return torch.where(groups == owners[:, None, None], products, 0).double().square().sum((1, 2))


def squares_between(
    products: Stack, groups: Int[Tensor, "m n"], owners: Int[Tensor, "k"]
) -> Float[Tensor, "groups groups"]:
    """The squared norms in every group, summed over the products with probes of every group.

    Args:
        products: what the block makes of the probes.
        groups: the number of the group of every entry.
        owners: the number of the group of every probe.
    """
    count = int(groups.max()) + 1
    found = torch.zeros(count, count, dtype=torch.float64)
    within = products.double().square().flatten(1) @ torch.eye(count, dtype=torch.float64)[groups.flatten()]
    return found.index_add_(1, owners, within.T)


class Exact:
    """The shares of a block from its products with all basis matrices, a few at a time.

    Args:
        m: rows of the matrix.
        n: columns of the matrix.
        groups: the number of the group of every entry, ``(m, n)``; None: no groups.
    """

    def __init__(self, m: int, n: int, groups: Int[Tensor, "m n"] | None = None) -> None:
        self.shape = m, n
        self.groups = groups
        self._rows = torch.arange(m)[:, None].expand(m, n)
        self._square, self._within = torch.zeros(2, dtype=torch.float64)
        self._between = None if groups is None else squares_between(torch.zeros(0, m, n), groups, torch.arange(0))
        self._left, self._right = torch.zeros(m, m, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)

    def add(self, start: int, products: Stack) -> None:
        """Take in the products with the basis matrices from number `start` on."""
        m, n = self.shape
        stop = start + len(products)
        left, right = partial_traces(units(m, n, start, stop).to(products), products)
        self._left += left
        self._right += right
        self._square += products.double().square().sum()
        self._within += squares_within(products, self._rows, self._rows.reshape(-1)[start:stop]).sum()
        if self.groups is not None and self._between is not None:
            self._between += squares_between(products, self.groups, self.groups.reshape(-1)[start:stop])

    def shares(self) -> Shares:
        """The shares, when all products are in."""
        m, n = self.shape
        squares = self._left.square().sum() / n, self._right.square().sum() / m, self._left.trace().square() / (m * n)
        found = torch.stack([self._square, self._within, *squares])
        return {name: Estimate(value) for name, value in _named(found, self._between).items()}


class Probed:
    """The shares of a block from its products with sets of random signs.

    Args:
        m: rows of the matrix.
        n: columns of the matrix.
        groups: the number of the group of every entry, ``(m, n)``; None: no groups.
        random: where the signs come from.
        variants: how many probes of a set differ by signs of rows only, at least 2.
    """

    def __init__(
        self, m: int, n: int, groups: Int[Tensor, "m n"] | None, random: torch.Generator, variants: int = 4
    ) -> None:
        self.shape = m, n
        self.groups = groups
        self.random = random
        self.variants = variants
        self._sums: list[Tensor] = []
        self._between: list[Tensor] = []
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []

    def draw(self) -> Stack:
        """A set of probes: the variants, then one probe for each group, zero outside of it."""
        m, n = self.shape
        self._signs = signs(self.random, self.variants, m, 1)
        probes = self._signs * signs(self.random, m, n)
        if self.groups is not None:
            numbers = torch.arange(int(self.groups.max()) + 1)[:, None, None]
            probes = torch.cat([probes, torch.where(self.groups == numbers, signs(self.random, m, n), 0.0)])
        return probes

    def add(self, probes: Stack, products: Stack) -> None:
        """Take in the products with the last set that was drawn."""
        k = self.variants
        own = products[:k].double()
        z = own * self._signs.to(own)
        within = (z.sum(0).square().sum() - z.square().sum()) / (k * (k - 1))
        if self.groups is not None:
            self._between.append(squares_between(products[k:], self.groups, torch.arange(len(products) - k)))
        self._sums.append(torch.stack([own.square().sum() / k, within]))
        left, right = partial_traces(probes[:k].to(products), products[:k])
        self._left.append(left / k)
        self._right.append(right / k)

    def shares(self) -> Shares:
        """The shares and their standard errors, from at least `SETS` sets.

        Raises:
            ValueError: for fewer sets.
        """
        if len(self._sums) < SETS:
            raise ValueError(f"{len(self._sums)} sets of probes have no standard error: add at least {SETS}.")
        m, n = self.shape
        sums, between = torch.stack(self._sums), torch.stack(self._between) if self._between else None
        traces = torch.stack([left.trace() for left in self._left])[:, None]
        products = [_gram(torch.stack(self._left)) / n, _gram(torch.stack(self._right)) / m, _gram(traces) / (m * n)]
        names: list[str] = []

        def found(sets: Tensor) -> Tensor:
            """The shares that a choice of sets gives."""
            squares = torch.stack([_mean_of_pairs(gram[sets][:, sets]) for gram in products])
            named = _named(torch.cat([sums[sets].mean(0), squares]), None if between is None else between[sets].mean(0))
            names[:] = named
            return torch.tensor(list(named.values()), dtype=torch.float64)

        values, errors = jackknife(found, len(sums))
        return {name: Estimate(*pair) for name, *pair in zip(names, values.tolist(), errors.tolist(), strict=True)}


def jackknife(found: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The values found from all of `count` samples, and their standard errors from leaving each out once.

    Args:
        found: from the numbers of the samples to a vector of values.
        count: how many samples there are.
    """
    every = torch.arange(count)
    without = torch.stack([found(every[every != left_out]) for left_out in range(count)])
    spread = (without - without.mean(0)).square().sum(0)
    return found(every), ((count - 1) / count * spread).sqrt()


def mean(samples: Tensor) -> Estimate:
    """The mean of independent samples and its standard error."""
    samples = samples.double()
    return Estimate(float(samples.mean()), float(samples.std() / len(samples) ** 0.5))


def _gram(stack: Tensor) -> Float[Tensor, "r r"]:
    flat = stack.double().flatten(1)
    return flat @ flat.T


def _mean_of_pairs(gram: Float[Tensor, "r r"]) -> Tensor:
    """The mean of the entries off the diagonal: products of different, so independent, samples."""
    return (gram.sum() - gram.trace()) / (len(gram) * (len(gram) - 1))


def _named(sums: Tensor, between: Tensor | None) -> dict[str, float]:
    """Shares and relative norms from squared norms: of all, in rows, of the projections; and between groups."""
    whole, rows, left, right, scalar = sums.tolist()
    if not whole > 0:
        of_groups = [] if between is None else ["groups", "coupling"]
        return dict.fromkeys(["norm", "rows", *of_groups, "left", "right", "scalar"], 0.0)
    shares = {"norm": whole**0.5, "rows": rows / whole}
    if between is not None:
        total = float(between.sum())
        shares |= {"groups": float(between.trace()) / total if total > 0 else 0.0, "coupling": _coupling(between)}
    sides = {"left": left, "right": right, "scalar": scalar}
    return shares | {name: (max(square, 0.0) / whole) ** 0.5 for name, square in sides.items()}


def _coupling(between: Float[Tensor, "groups groups"]) -> float:
    """From squared norms the root mean square of normalised ones off the diagonal; 0 for groups without curvature."""
    own = between.diagonal()
    scale = (own[:, None] * own).sqrt()
    normal = torch.where(scale > 0, between / scale, 0)
    count = len(own)
    return float((normal.sum() - normal.trace()) / (count * (count - 1))) ** 0.5
