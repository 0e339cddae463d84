"""ASGO as the papers write it: numpy, float64, one matrix at a time, an explicit eigendecomposition.

Independent of the library: it imports nothing of it.
"""

import numpy as np

CROSS_DECAY = 0.95


def power(matrix, exponent):
    """A symmetric matrix to a real power, null directions left out."""
    values, vectors = np.linalg.eigh(matrix)
    keep = values > 1e-14 * max(values.max(initial=0.0), 1e-300)
    return (vectors[:, keep] * values[keep] ** exponent) @ vectors[:, keep].T


def damped_root(gram, eps):
    k = gram.shape[0]
    return power(gram + eps * np.linalg.norm(gram) * np.eye(k), -0.5)


def outside_root(gram, eps):
    return np.linalg.inv(power(gram, 0.5) + eps * np.eye(gram.shape[0]))


def asgo(
    weight,
    grads,
    *,
    lr=1e-2,
    betas=(0.95, 0.2),
    eps=1e-6,
    weight_decay=0.1,
    statistic="momentum",
    nesterov=True,
    cross_normalize=True,
    adjust_lr="rms",
    side="auto",
    root=damped_root,
    interval=1,
):
    """The weights after a step with each gradient, by the formulas of the class docstring."""
    weight = np.asarray(weight, dtype=np.float64)
    m, n = weight.shape
    left = side == "left" or (side == "auto" and m < n)
    b1, b2 = betas
    k = m if left else n
    momentum, gram, cross = np.zeros((m, n)), np.zeros((k, k)), np.zeros((1, n) if left else (m, 1))
    weight_of_cross = np.zeros_like(cross)
    if b2 == 1:
        limit = 1
    elif statistic == "momentum":
        limit = (1 - b2) ** -0.5
    else:
        limit = max(1, *((1 - b1 ** (t + nesterov)) / (1 - b2**t) ** 0.5 for t in range(1, 1000)))
    precondition = np.eye(k)
    for t, given in enumerate(grads):
        grad = np.asarray(given, dtype=np.float64)
        weight = weight * (1 - lr * weight_decay)
        momentum = b1 * momentum + (1 - b1) * grad
        direction = b1 * momentum + (1 - b1) * grad if nesterov else momentum
        seen = direction if statistic == "momentum" else grad
        measured = seen @ seen.T if left else seen.T @ seen
        gram = gram + measured if b2 == 1 else b2 * gram + (1 - b2) * measured
        if t < 10 or (t + 1) % interval == 0:
            precondition = root(gram, eps)
        update = precondition @ direction if left else direction @ precondition
        if interval > 1:
            lengths = np.linalg.norm(update, axis=1 if left else 0, keepdims=True)
            update = update * np.minimum(1, limit / np.maximum(lengths, 1e-300))
        if cross_normalize:
            square = (update**2).mean(axis=0 if left else 1, keepdims=True)
            cross = CROSS_DECAY * cross + (1 - CROSS_DECAY) * square
            started = (square > 0) | (weight_of_cross > 0)
            weight_of_cross = np.where(started, CROSS_DECAY * weight_of_cross + 1 - CROSS_DECAY, 0)
            update = update / np.sqrt(np.where(started, cross / np.where(started, weight_of_cross, 1), 1))
        if adjust_lr == "rms":
            update = update * 0.2 * np.sqrt(m * n) / np.linalg.norm(update)
        weight = weight - lr * update
    return weight
