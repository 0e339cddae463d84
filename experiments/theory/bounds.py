r"""The bounds, each for the sum over T rounds. Divide by T for the mean.

With ``E_t = W_t - W*``, a distance D that no ``||E_t||`` of the run exceeds, a step size ``eta`` and the method's trace
``Tr`` of its own statistic of the gradients that were seen:

regret (any convex ``f_t``, smooth or not, random or chosen by an enemy; holds on every single run)::

    sum f_t(W_t) - f_t(W*)  <=  sum <G_t, E_t>  <=  K Tr + slack,      K = D^2 / (2 eta) + weight eta

because ``<G, E>`` is ``(||E_t||^2 - ||E_(t+1)||^2) / (2 eta) + eta ||G||^2 / 2`` in the norms of the preconditioner and
of its inverse; the first part telescopes to ``D^2 Tr / (2 eta)``, the second adds up to at most ``eta Tr`` (Shampoo: r
times that). D is taken over the iterates of the run itself, so nothing is assumed about where they stay.

nonsmooth (in expectation, with D the largest over all runs)::

    E sum F(W_t) - F(W*)  <=  K ||Q||_* sqrt(T) + slack,               E G G^T <= Q^2

because the expectation of a root is at most the root of the expectation.

smooth (on every run where gradients have no noise, else in expectation)::

    S = sum F(W_t) - F(W*)  <=  K (sqrt(2 tr(L) S) + sqrt(T) tr(Sigma^(1/2))) + slack

with L a smoothness matrix and Sigma the covariance of the noise in a gradient (a batch of M divides it by M), because
``tr(V^(1/2)) <= sqrt(tr(L) tr(L^-1 V))`` and ``<grad F, L^-1 grad F> <= 2 (F - F*)``. The largest S that satisfies
this is the bound. With ``eta = D / sqrt(2)`` it is at most ``4 D^2 tr(L) + 2 sqrt(2) D sqrt(T) tr(Sigma^(1/2))``.

"ASGO: Adaptive Structured Gradient Optimization", An, Liu, Pan, Ren, Ma, Goldfarb and Zhang, 2025, has the two theorems
for ASGO; the constants here are derived anew, alike for all methods. "Structured Preconditioners in Adaptive
Optimization: A Unified Analysis", Xie, Wang, Reddi, Kumar and Li, 2025, has them for matrix algebras; the bound of
Shampoo is that of "Shampoo: Preconditioned Stochastic Tensor Optimization", Gupta, Koren and Singer, 2018.
"""

from __future__ import annotations

import math

from torch import Tensor


def best_step(distance: Tensor, weight: float) -> Tensor:
    """``D / sqrt(2 weight)``, at which the regret bound is smallest."""
    return distance / math.sqrt(2 * weight)


def factor(distance: Tensor, eta: Tensor, weight: float) -> Tensor:
    """``K``."""
    return distance.square() / (2 * eta) + weight * eta


def nonsmooth(factor: Tensor, moment: Tensor, rounds: int) -> Tensor:
    """The bound in expectation, without slack; `moment` is ``||Q||_*`` or what stands for it."""
    return factor * moment * math.sqrt(rounds)


def smooth(factor: Tensor, hessian: Tensor, rest: Tensor) -> Tensor:
    """The largest S with ``S <= factor sqrt(2 hessian S) + rest``.

    Args:
        factor: ``K``.
        hessian: ``tr L`` or what stands for it.
        rest: all that does not depend on S; a `rest` so far below 0 that no S satisfies the inequality counts as the
            least that one does.
    """
    linear = factor * (2 * hessian).sqrt()
    return ((linear + (linear.square() + 4 * rest).clamp_min(0).sqrt()) / 2).square()
