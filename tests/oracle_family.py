"""The family as the papers write it: numpy, float64, one parameter at a time, explicit matrices and loops.

Independent of the library: it imports nothing of it. Every function gives the weights after a step with each gradient.
"""

import numpy as np

from oracle import power


def dasgo(weight, grads, *, lr, betas, eps, weight_decay, axis):
    """Algorithm 4 of the ASGO paper: one number per column, eps inside, update rescaled to an RMS of 0.2."""
    momentum, square = np.zeros_like(weight), 0.0
    for grad in grads:
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        square = betas[1] * square + (1 - betas[1]) * (grad**2).sum(axis={"column": 0, "row": 1}[axis], keepdims=True)
        update = momentum / np.sqrt(square + eps)
        update *= 0.2 * np.sqrt(weight.size) / np.linalg.norm(update)
        weight = weight * (1 - lr * weight_decay) - lr * update
    return weight


def bag(weight, grads, blocks, *, lr, eps):
    """`blocks` holds the number of its block for every entry."""
    square = np.zeros(blocks.max() + 1)
    for grad in grads:
        for b in range(len(square)):
            square[b] += (grad[blocks == b] ** 2).mean()
        weight = weight - lr * grad / (np.sqrt(square[blocks]) + eps)
    return weight


def bagm(weight, grads, blocks, *, lr, betas, eps, weight_decay=0.0):
    """The paper's weighted mean, with a_t = b2^-t."""
    weighted, total, momentum = np.zeros(blocks.max() + 1), 0.0, np.zeros_like(weight)
    for t, grad in enumerate(grads, 1):
        a = betas[1] ** -t
        total += a
        for b in range(len(weighted)):
            weighted[b] += a * (grad[blocks == b] ** 2).mean()
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        size = np.sqrt(weighted[blocks] / total) + eps
        weight = weight * (1 - lr * weight_decay) - lr * momentum / size
    return weight


def adam_mini(weight, grads, blocks, *, lr, betas, eps, weight_decay):
    square, momentum = np.zeros(blocks.max() + 1), np.zeros_like(weight)
    for t, grad in enumerate(grads, 1):
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        for b in range(len(square)):
            square[b] = betas[1] * square[b] + (1 - betas[1]) * (grad[blocks == b] ** 2).mean()
        size = np.sqrt(square[blocks] / (1 - betas[1] ** t)) + eps
        weight = weight * (1 - lr * weight_decay) - lr * momentum / (1 - betas[0] ** t) / size
    return weight


def agd(weight, grads, *, lr, betas, delta, weight_decay):
    momentum, square = np.zeros_like(weight), np.zeros_like(weight)
    for t, grad in enumerate(grads, 1):
        before = momentum / (1 - betas[0] ** (t - 1)) if t > 1 else 0.0
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        now = momentum / (1 - betas[0] ** t)
        square = betas[1] * square + (1 - betas[1]) * (now - before) ** 2
        size = np.maximum(np.sqrt(square), delta * np.sqrt(1 - betas[1] ** t))
        weight = weight * (1 - lr * weight_decay) - lr * np.sqrt(1 - betas[1] ** t) * now / size
    return weight


def full_matrix_adagrad(weight, grads, *, lr, eps):
    """Dense: G <- G + g g^T from eps I, step G^(-1/2) g."""
    total = eps * np.eye(weight.size)
    for grad in grads:
        total += np.outer(grad, grad)
        weight = weight - lr * (power(total, -0.5) @ grad.reshape(-1)).reshape(weight.shape)
    return weight


def one_sided_shampoo(weight, grads, *, lr, eps, side):
    m, n = weight.shape
    total = eps * np.eye(m if side == "left" else n)
    for grad in grads:
        total += grad @ grad.T / n if side == "left" else grad.T @ grad / m
        root = power(total, -0.5)
        weight = weight - lr * (root @ grad if side == "left" else grad @ root)
    return weight


def shampoo(weight, grads, *, lr, betas, eps, weight_decay):
    """Algorithm 1 of the paper, with momentum; with betas[1] below 1, averages in place of sums."""
    m, n = weight.shape
    left, right, momentum = np.zeros((m, m)), np.zeros((n, n)), np.zeros((m, n))
    keep, take = (1, 1) if betas[1] == 1 else (betas[1], 1 - betas[1])
    for grad in grads:
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        left, right = keep * left + take * grad @ grad.T, keep * right + take * grad.T @ grad
        update = power(left + eps * np.eye(m), -0.25) @ momentum @ power(right + eps * np.eye(n), -0.25)
        weight = weight * (1 - lr * weight_decay) - lr * update
    return weight


def adagram_factor(weight, grads, *, lr, eps, rank, integrator):
    """The paper: G = L L^T, L^-1 = eps^(-1/2) (I - A), and A brought back to `rank` with dense U, S and V."""
    d = weight.size
    A, columns = np.zeros((d, d)), 0
    for grad in grads:
        h = (np.eye(d) - A) @ grad.reshape(-1) / np.sqrt(eps)
        s = np.sqrt(1 + h @ h)
        weight = weight - lr * (h / s).reshape(weight.shape)
        D = np.outer(h / (1 + s) / s, h - A.T @ h)
        if columns < (rank or d) or rank is None:
            A, columns = A + D, columns + 1
            continue
        U, sigma, Vh = np.linalg.svd(A)
        U, S, V = U[:, :rank], np.diag(sigma[:rank]), Vh[:rank].T
        if integrator == "eig":
            U, sigma, Vh = np.linalg.svd(A + D)
            A = (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
        elif integrator == "psi":
            U1, S_hat = np.linalg.qr(U @ S + D @ V)
            S_tilde = S_hat - U1.T @ D @ V
            V1, S1T = np.linalg.qr(V @ S_tilde.T + D.T @ U1)
            A = U1 @ S1T.T @ V1.T
        else:
            U1, V1 = np.linalg.qr(U @ S + D @ V)[0], np.linalg.qr(V @ S.T + D.T @ U)[0]
            A = U1 @ ((U1.T @ U) @ S @ (V1.T @ V).T + U1.T @ D @ V1) @ V1.T
    return weight


def adagram_symmetric(weight, grads, *, lr, eps, rank, integrator, compensate):
    """``delta I + Y``, Y of `rank`, with dense matrices throughout."""
    d = weight.size
    Y, delta = np.zeros((d, d)), eps
    for grad in grads:
        g = grad.reshape(-1)
        basis = np.linalg.eigh(Y)[1][:, -rank:]
        total = Y + np.outer(g, g)
        weight = weight - lr * (power(delta * np.eye(d) + total, -0.5) @ g).reshape(weight.shape)
        values, vectors = np.linalg.eigh(total)
        Y = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        if integrator == "bug" and values[-rank - 1] > 1e-12 * values[-1]:
            U = np.linalg.qr(total @ basis)[0]
            Y = U @ (U.T @ total @ U) @ U.T
        delta += compensate * (np.trace(total) - np.trace(Y)) / (d - rank)
    return weight


def spam(weight, grads, *, lr, betas, eps, threshold, interval, warmup):
    """SPAM around Adam; at a reset both moments, their correction and the spikes' mean square start anew."""
    first = second = spikes = np.zeros_like(weight)
    steps = 0
    for t, given in enumerate(grads, 1):
        since = t % interval
        if since == 0:
            first = second = spikes = np.zeros_like(weight)
            steps = 0
        grad = given
        if since >= 20:
            limit = np.sqrt(threshold * spikes)
            grad = np.where(given**2 > threshold * spikes, np.sign(given) * limit, given)
        spikes = 0.999 * spikes + 0.001 * grad**2
        share = 1.0
        if t >= interval and since < warmup:
            share = 1 - 0.99 * (1 + np.cos(np.pi * since / (warmup + 1))) / 2
        steps += 1
        first, second = betas[0] * first + (1 - betas[0]) * grad, betas[1] * second + (1 - betas[1]) * grad**2
        size = np.sqrt(second / (1 - betas[1] ** steps)) + eps
        weight = weight - share * lr * first / (1 - betas[0] ** steps) / size
    return weight


def adablock(weight, grads, *, lr, block_size, betas, eps, weight_decay, clip=None, gamma=1e-3, blocks=lambda t: True):
    """Runs of `block_size` rows in every column; where `blocks(t)` is false, the diagonal of their statistic."""
    m, n = weight.shape
    runs = [(slice(i, min(i + block_size, m)), j) for j in range(n) for i in range(0, m, block_size)]
    full, momentum = [np.zeros((r.stop - r.start,) * 2) for r, _ in runs], np.zeros((m, n))
    for t, grad in enumerate(grads, 1):
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        weight = weight * (1 - lr * weight_decay)
        step = np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        for b, run in enumerate(runs):
            full[b] = betas[1] * full[b] + (1 - betas[1]) * np.outer(grad[run], grad[run])
            values, vectors = np.linalg.eigh(full[b]) if blocks(t) else (np.diag(full[b]), np.eye(len(full[b])))
            size = step / (np.sqrt(values.clip(min=0)) + eps)
            if clip is not None:
                size = size.clip(clip * (1 - 1 / (gamma * t + 1)), clip * (1 + 1 / (gamma * t)))
            weight[run] -= lr * (vectors * size) @ vectors.T @ momentum[run]
    return weight
