"""The losses of the four generalized linear models, with their derivatives, for any number of models at once.

``z (..., B, m)`` are linear predictions for a batch of `B` examples, ``y (..., B)`` what was observed. Each loss
is never negative, so that ratios of losses mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of linear predictions.

    Args:
        name: of the model.
        each: the loss of each example, ``(..., B)``.
        slope: its derivative with respect to `z`, ``(..., B, m)``.
    """

    name: str
    each: Kernel
    slope: Kernel


def _linear(z: Tensor, y: Tensor) -> Tensor:
    return (z[..., 0] - y).square() / 2


def _linear_slope(z: Tensor, y: Tensor) -> Tensor:
    return z - y[..., None]


def _logistic(z: Tensor, y: Tensor) -> Tensor:
    # log(1 + exp(-z)) for y = 1, log(1 + exp(z)) for y = 0
    return F.softplus((1 - 2 * y) * z[..., 0])


def _logistic_slope(z: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(z) - y[..., None]


def _softmax(z: Tensor, y: Tensor) -> Tensor:
    picked = torch.take_along_dim(z, _classes(z, y), -1)[..., 0]
    return torch.logsumexp(z, -1) - picked


def _softmax_slope(z: Tensor, y: Tensor) -> Tensor:
    classes = torch.arange(z.shape[-1], device=z.device, dtype=y.dtype)
    return torch.softmax(z, -1) - (y[..., None] == classes).to(z.dtype)


def _classes(z: Tensor, y: Tensor) -> Tensor:
    return y.long().expand(z.shape[:-1])[..., None]


def _poisson(z: Tensor, y: Tensor) -> Tensor:
    # Half the deviance: the negative log-likelihood less its smallest value, which is that of exp(z) = y.
    mean = z[..., 0].exp()
    return mean - y - y * z[..., 0] + torch.special.xlogy(y, y)


def _poisson_slope(z: Tensor, y: Tensor) -> Tensor:
    return z.exp() - y[..., None]


LOSSES: dict[str, Loss] = {
    "linear": Loss("linear", _linear, _linear_slope),
    "logistic": Loss("logistic", _logistic, _logistic_slope),
    "softmax": Loss("softmax", _softmax, _softmax_slope),
    "poisson": Loss("poisson", _poisson, _poisson_slope),
}
"""Half the square, log-likelihood of a class, and half the deviance of a count with a log link."""
