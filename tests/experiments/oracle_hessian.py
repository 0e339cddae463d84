"""What the estimates of `experiments.hessian.estimates` are estimates of, from a dense matrix."""

import numpy as np


def reference(H, m, n, groups=None):
    """The shares of the module docstring from a dense matrix, by explicit Kronecker products and masks."""
    whole = np.linalg.norm(H)
    left = np.zeros((m * n, m * n))
    right, S, T = left.copy(), np.zeros((m, m)), np.zeros((n, n))
    for i in range(m):
        for j in range(m):
            S[i, j] = np.trace(H[i * n : (i + 1) * n, j * n : (j + 1) * n]) / n
    for i in range(m):
        T += H[i * n : (i + 1) * n, i * n : (i + 1) * n] / m
    left, right = np.kron(S, np.eye(n)), np.kron(np.eye(m), T)
    scalar = np.trace(H) / (m * n) * np.eye(m * n)
    rows = np.repeat(np.arange(m), n)
    shares = {
        "norm": whole,
        "rows": (H[rows[:, None] == rows] ** 2).sum() / whole**2,
        "left": np.linalg.norm(left) / whole,
        "right": np.linalg.norm(right) / whole,
        "scalar": np.linalg.norm(scalar) / whole,
    }
    if groups is not None:
        labels = groups.flatten().numpy()
        shares["groups"] = (H[labels[:, None] == labels] ** 2).sum() / whole**2
        names = np.unique(labels)
        square = np.array([[(H[labels == a][:, labels == b] ** 2).sum() for b in names] for a in names])
        normal = square / np.sqrt(np.outer(np.diag(square), np.diag(square)))
        shares["coupling"] = np.sqrt((normal.sum() - len(names)) / (len(names) * (len(names) - 1)))
    return shares
