"""ASGO against the float64 oracle, and the identities that every build must satisfy."""

import numpy as np
import pytest
import torch
from torch import nn

import oracle
from asgo import ASGO, View
from asgo.views import MATRIX, fused_qkv, heads

SHAPES = [(4, 9), (9, 4), (6, 6), (1, 7), (7, 1), (1, 1)]
OPTIONS = {
    "default": {},
    "gradient": {"statistic": "gradient"},
    "plain momentum": {"nesterov": False},
    "no cross": {"cross_normalize": False},
    "all of the paper's": {
        "statistic": "gradient",
        "nesterov": False,
        "cross_normalize": False,
        "betas": (0.9, 0.8),
    },
    "no momentum": {"betas": (0.0, 0.9)},
    "accumulated": {"betas": (0.9, 1.0)},
    "no rescale": {"adjust_lr": None, "lr": 1e-3},
    "no decay": {"weight_decay": 0.0},
    "interval": {"precondition_frequency": 4},
}


def gradients(shape, steps, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


def run(make, weight, grads, **group):
    """The parameter after one step with each gradient."""
    param = nn.Parameter(weight.clone())
    optimizer = make([{"params": [("w", param)], **group}])
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer


def relative(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-4)], ids=str)
def test_equals_the_oracle(shape, options, dtype, tolerance):
    weight, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 25)
    root = "eigh64"  # the products of "auto" are made to be 2e-3 from exact
    got, _ = run(lambda p: ASGO(p, **{"root": root, **options}), weight.to(dtype), [g.to(dtype) for g in grads])
    renamed = {("interval" if k == "precondition_frequency" else k): v for k, v in options.items()}
    want = oracle.asgo(weight.to(dtype).numpy(), [g.to(dtype).numpy() for g in grads], **renamed)
    # What one step may move is the scale of an error that counts, not the weight itself.
    moved = np.linalg.norm(want - weight.to(dtype).numpy().astype(np.float64))
    assert np.linalg.norm(got.double().numpy() - want) <= tolerance * max(moved, 1e-3)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "interval"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
def test_the_square_root_form_equals_the_oracle(shape, name):
    """In float64 it damps by 1e-14; without Nesterov the direction is the momentum, which has to stay."""
    weight, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 25)
    got, _ = run(lambda p: ASGO(p, **{"root": "square_root", **OPTIONS[name]}), weight, grads)
    assert relative(got, oracle.asgo(weight, grads, **{"eps": 1e-14, **OPTIONS[name]})) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
def test_a_given_side_is_obeyed(shape, side):
    weight, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 12)
    got, optimizer = run(ASGO, weight, grads, side=side, view=MATRIX)
    assert relative(got, oracle.asgo(weight, grads, side=side)) < 1e-9
    k = shape[0] if side == "left" else shape[1]
    assert next(iter(optimizer.state.values()))["gram"].shape == (1, k, k)


# ---- Section 6 of the identities: 1. without memory it is the polar factor ------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("root", ["eigh", "minimax"])
@pytest.mark.parametrize("statistic", ["gradient", "momentum"])
def test_without_memory_it_is_the_polar_factor(shape, root, statistic):
    def make(params):
        return ASGO(params, 1.0, (0.0, 0.0), 1e-10, 0.0, 1, statistic, True, False, root=root)

    grad = gradients(shape, 1)[0]
    got, _ = run(make, torch.zeros(shape, dtype=torch.float64), [grad])
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    assert relative(-got, 0.2 * max(shape) ** 0.5 * u @ vh) < 1e-4
    assert got.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-9)


def test_muon_is_the_limit_of_the_momentum_statistic():
    grads = gradients((5, 12), 8)
    got, _ = run(lambda p: ASGO(p, 1.0, (0.9, 0.0), 1e-10, 0.0, cross_normalize=False), grads[0] * 0, grads)
    want, momentum = torch.zeros(5, 12, dtype=torch.float64), torch.zeros(5, 12, dtype=torch.float64)
    for grad in grads:
        momentum.lerp_(grad, 0.1)
        u, _, vh = torch.linalg.svd(momentum.lerp(grad, 0.1), full_matrices=False)
        want -= 0.2 * 12**0.5 * u @ vh
    assert relative(got, want) < 1e-4


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("root", ["eigh", "minimax"])
def test_the_scale_of_the_gradient_does_not_matter(scale, root):
    weight, grads = torch.randn(6, 16), gradients((6, 16), 12, dtype=torch.float32)
    one, _ = run(lambda p: ASGO(p, root=root), weight, grads)
    other, optimizer = run(lambda p: ASGO(p, root=root), weight, [g * scale for g in grads])
    assert (one - other).abs().max() < 2e-5
    assert optimizer.failures() == {}


# ---- 2. transpose, heads, fused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_left_on_g_is_right_on_g_transposed(options):
    weight, grads = torch.randn(5, 8, dtype=torch.float64), gradients((5, 8), 12)
    left, _ = run(lambda p: ASGO(p, **options), weight, grads, side="left", view=MATRIX)
    right, _ = run(lambda p: ASGO(p, **options), weight.T, [g.T for g in grads], side="right", view=MATRIX)
    stored, _ = run(lambda p: ASGO(p, **options), weight.T, [g.T for g in grads], side="left", view="n m -> 1 m n")
    assert relative(left, right.T) < 1e-9
    assert relative(left, stored.T) < 1e-12


def test_one_head_is_the_whole_matrix():
    weight, grads = torch.randn(6, 8, dtype=torch.float64), gradients((6, 8), 12)
    assert torch.equal(run(ASGO, weight, grads, view=heads(1))[0], run(ASGO, weight, grads, view=MATRIX)[0])


def test_heads_are_matrices_of_their_own():
    weight, grads = torch.randn(6, 8, dtype=torch.float64), gradients((6, 8), 12)
    whole, _ = run(lambda p: ASGO(p, adjust_lr="slice_rms"), weight, grads, view=heads(3))
    for h in range(3):
        rows = slice(2 * h, 2 * h + 2)
        alone, _ = run(ASGO, weight[rows], [g[rows] for g in grads], view=MATRIX)
        assert relative(whole[rows], alone) < 1e-12


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_qkv_is_separate_q_k_v(transposed):
    q, k, v, d, n = 8, 4, 4, 2, 10
    weight, grads = torch.randn(q + k + v, n, dtype=torch.float64), gradients((q + k + v, n), 12)
    turn = (lambda x: x.T.contiguous()) if transposed else (lambda x: x)
    fused, _ = run(ASGO, turn(weight), [turn(g) for g in grads], view=fused_qkv(q, k, v, d, transposed))
    start = 0
    for size, view in [(q, heads(q // d)), (k, heads(k // d)), (v, MATRIX)]:
        rows = slice(start, start + size)
        alone, _ = run(ASGO, weight[rows], [g[rows] for g in grads], view=view)
        assert relative(turn(fused)[rows], alone) < 1e-12
        start += size


def test_a_bucket_gives_what_each_parameter_gives_alone():
    shapes = [(5, 8), (5, 8), (3, 4), (5, 8)]
    weights = [torch.randn(s, dtype=torch.float64) for s in shapes]
    grads = [gradients(s, 12, seed=i) for i, s in enumerate(shapes)]
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = ASGO(params)
    for step in range(12):
        for i, param in enumerate(params):
            # One member comes and goes: its bucket is made anew and its state carried over.
            param.grad = None if i == 1 and step % 3 == 0 else grads[i][step].clone()
        optimizer.step()
    for i, param in enumerate(params):
        seen = [g for step, g in enumerate(grads[i]) if not (i == 1 and step % 3 == 0)]
        assert relative(param.detach(), run(ASGO, weights[i], seen)[0]) < 1e-12


# ---- 3. the theory form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_theory_form_is_dense_adagrad_on_a_kronecker_algebra(side):
    """V_t acts on vec(G) as S kron I: dense AdaGrad whose statistic is projected on that algebra.

    The projection is the partial trace divided by the other length, so lr and eps differ by its square root.
    """
    m, n, lr, eps = 4, 6, 0.3, 1e-3
    weight, grads = torch.randn(m, n, dtype=torch.float64), gradients((m, n), 15)
    got, _ = run(lambda p: ASGO.theory(p, lr, eps), weight, grads, side=side, view=MATRIX)
    other = n if side == "left" else m
    vector, dense = weight.numpy().reshape(-1).copy(), np.zeros((m * n, m * n))
    for grad in grads:
        dense += np.outer(grad, grad)
        cells = dense.reshape(m, n, m, n)
        if side == "left":
            projected = np.kron(np.einsum("injn->ij", cells) / n, np.eye(n))
        else:
            projected = np.kron(np.eye(m), np.einsum("minj,mn->ij", cells, np.eye(m)) / m)
        root = np.linalg.inv(oracle.power(projected, 0.5) + eps / np.sqrt(other) * np.eye(m * n))
        vector -= lr / np.sqrt(other) * root @ grad.numpy().reshape(-1)
    assert relative(got, vector.reshape(m, n)) < 1e-9


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_measured_regret_never_exceeds_the_bound(lr, rank):
    """sum <G_t, W_t - W*> <= (D_op^2 / (2 lr) + lr) tr(V_T^(1/2)) + eps D_F^2 / (2 lr), for every lr."""
    m, n, eps, steps = 8, 12, 1e-6, 60
    generator = torch.Generator().manual_seed(rank)
    target = torch.randn(m, n, generator=generator, dtype=torch.float64)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    optimizer = ASGO.theory([{"params": [param], "view": MATRIX, "side": "left"}], lr, eps)
    regret, d_op, d_f = 0.0, 0.0, 0.0
    for _ in range(steps):
        a = left @ torch.randn(rank, generator=generator, dtype=torch.float64)
        b = torch.randn(n, generator=generator, dtype=torch.float64)
        error = param.detach() - target
        d_op = max(d_op, torch.linalg.matrix_norm(error, 2).item())
        d_f = max(d_f, torch.linalg.matrix_norm(error).item())
        param.grad = torch.sign(a @ error @ b) * torch.outer(a, b)  # |a^T (W - W*) b|, convex, not smooth
        regret += (param.grad * error).sum().item()
        optimizer.step()
    gram = optimizer.state[param]["gram"][0]
    trace = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum().item()
    assert regret > 0
    assert regret <= (d_op**2 / (2 * lr) + lr) * trace + eps * d_f**2 / (2 * lr)


# ---- the released program ---------------------------------------------------------------------------------------


def released(weight, grads, lr=1e-2, momentum=0.9, beta2=0.8, weight_decay=0.1):
    """What the released program computes where its iteration has converged, in float64.

    Its ten steps end in (15 - 10 + 3)/8 = 1 times the inverse root, so on a well-conditioned statistic the only
    difference to the exact root is rounding.
    """
    return oracle.asgo(
        weight, grads, lr=lr, betas=(momentum, beta2), weight_decay=weight_decay, eps=0.0, statistic="gradient",
        nesterov=False, cross_normalize=False,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 64), (24, 96)], ids=str)
def test_reference_mode_is_the_released_program(shape):
    weight, grads = 0.1 * torch.randn(shape), gradients(shape, 20, dtype=torch.float32)
    got, _ = run(ASGO.reference, weight, grads)
    assert relative(got, released(weight.numpy(), [g.numpy() for g in grads])) < 1e-5


def test_reference_mode_takes_the_right_side_of_a_square():
    _, optimizer = run(ASGO.reference, torch.randn(6, 6), gradients((6, 6), 2, dtype=torch.float32))
    grads = gradients((6, 6), 2, dtype=torch.float32)
    want = 0.8 * 0.2 * grads[0].T @ grads[0] + 0.2 * grads[1].T @ grads[1]
    assert torch.allclose(next(iter(optimizer.state.values()))["gram"][0], want, atol=1e-6)


def test_paper_mode_differs_from_the_reference_only_by_damping():
    weight, grads = torch.randn(8, 32), gradients((8, 32), 12, dtype=torch.float32)
    assert relative(run(ASGO.paper, weight, grads)[0], run(ASGO.reference, weight, grads)[0]) < 1e-5


def test_view_objects_patterns_and_dicts_are_the_same():
    weight, grads = torch.randn(6, 8), gradients((6, 8), 5, dtype=torch.float32)
    views = [View("(h d) n -> h d n", {"h": 2}), heads(2).to_dict(), heads(2)]
    results = [run(ASGO, weight, grads, view=view)[0] for view in views]
    assert all(torch.equal(results[0], other) for other in results[1:])
