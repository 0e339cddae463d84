"""Every method against its paper in float64, the identities between them, and what they refuse."""

import copy
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_asgo import gradients, relative, run
from torch import nn

import oracle_family as oracle
from asgo import (
    AGD,
    ASGO,
    BAG,
    BAGM,
    DASGO,
    SPAM,
    AdaBlock,
    AdaGram,
    AdamMini,
    OneSidedShampoo,
    Shampoo,
    View,
    checkpoint,
    route,
)
from asgo.linalg.spectral import RESOLUTION, inverse_power
from asgo.structures import LowRankFactor
from asgo.views import MATRIX, heads
from family import BAD, PRESETS, every_preset
from oracle import power

STEPS = 30


def case(shape, seed=0):
    """A start and gradients, as tensors and as arrays."""
    weight, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, STEPS, seed)
    return weight, grads, weight.numpy().copy(), [grad.numpy() for grad in grads]


# ---- one number per column -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("axis", ["column", "row", "auto"])
def test_dasgo_equals_its_paper(shape, axis):
    options = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    weight, grads, w, g = case(shape)
    got, optimizer = run(lambda p: DASGO(p, axis=axis, **options), weight, grads)
    meant = axis if axis != "auto" else ("row" if shape[0] < shape[1] else "column")
    assert relative(got, oracle.dasgo(w, g, axis=meant, **options)) < 1e-12
    held = next(iter(optimizer.state.values()))["exp_avg_sq"]
    assert held.shape == ((1, 1, shape[1]) if meant == "column" else (1, shape[0], 1))


def test_dasgo_is_bagm_with_columns_up_to_the_root_of_their_length():
    """Identity 4: a sum is m times a mean; the correction of the mean is a common factor."""
    m, options = 5, {"betas": (0.9, 0.95), "eps": 1e-16, "weight_decay": 0.0}
    sums, means = (nn.Parameter(torch.zeros(m, 7, dtype=torch.float64)) for _ in range(2))
    dasgo = DASGO([sums], lr=1.0, adjust_lr=None, **options)
    bagm = BAGM([means], blocks="column", **options)
    for t, grad in enumerate(gradients((m, 7), STEPS), 1):
        sums.grad, means.grad = grad.clone(), grad.clone()
        bagm.param_groups[0]["lr"] = m**-0.5 / (1 - 0.95**t) ** 0.5
        dasgo.step()
        bagm.step()
        assert relative(sums.detach(), means.detach()) < 1e-9


# ---- one number per block ------------------------------------------------------------------------------------------


def numbered(shape, blocks):
    """The number of its block for every entry."""
    index = np.indices(shape)
    if blocks == "tensor" or (blocks == "column" and len(shape) == 1):
        return np.zeros(shape, dtype=int)
    if blocks == "row" or (blocks == "kernel" and len(shape) < 3):
        return index[0]
    if blocks == "kernel":
        return index[0] * shape[1] + index[1]
    if blocks == "column":
        return index[1]
    return np.arange(np.prod(shape)).reshape(shape) * blocks // np.prod(shape)


BLOCKS = [
    *((blocks, shape) for blocks in ("tensor", "row", "kernel", "column") for shape in [(6,), (4, 9), (4, 3, 2, 2)]),
    *((count, shape) for count in (1, 2) for shape in [(6,), (4, 9), (4, 3, 5)]),
    (6, (6,)),
]


@pytest.mark.parametrize(("blocks", "shape"), BLOCKS, ids=str)
def test_bag_and_bagm_equal_their_paper_for_every_kind_of_block(blocks, shape):
    weight, grads, w, g = case(shape)
    number = numbered(shape, blocks)
    got, _ = run(lambda p: BAG(p, lr=0.1, eps=1e-3, blocks=blocks), weight, grads)
    assert relative(got, oracle.bag(w, g, number, lr=0.1, eps=1e-3)) < 1e-12
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.05}
    got, optimizer = run(lambda p: BAGM(p, blocks=blocks, **options), weight, grads)
    assert relative(got, oracle.bagm(w, g, number, **options)) < 1e-12
    assert next(iter(optimizer.state.values()))["exp_avg_sq"].numel() == number.max() + 1


def test_blocks_may_be_a_view_and_follow_the_views_of_groups():
    weight, grads, w, g = case((6, 8))
    halves = View("(a r) n -> a r n", {"r": 3})
    number = np.indices((6, 8))[0] // 3
    want = oracle.bag(w, g, number, lr=0.1, eps=1e-3)
    assert relative(run(lambda p: BAG(p, lr=0.1, eps=1e-3, blocks=halves), weight, grads)[0], want) < 1e-12
    assert relative(run(lambda p: BAG(p, lr=0.1, eps=1e-3), weight, grads, view=halves)[0], want) < 1e-12
    rows = run(lambda p: BAG(p, lr=0.1, eps=1e-3), weight, grads, view=heads(2), blocks="row")[0]
    assert relative(rows, oracle.bag(w, g, np.indices((6, 8))[0], lr=0.1, eps=1e-3)) < 1e-12


def test_bagm_with_single_entries_is_adam_up_to_the_momentums_correction():
    """Identity 4. Adam's own eps convention is BAGM's; only the first moment's correction is missing."""
    weight, grads = torch.randn(7, dtype=torch.float64), gradients((7,), STEPS)
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    mine = BAGM([ours], lr=1.0, betas=(0.9, 0.99), eps=1e-8, blocks=7)
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    for t, grad in enumerate(grads, 1):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.param_groups[0]["lr"] = 0.1 / (1 - 0.9**t)
        mine.step()
        adam.step()
    assert relative(ours.detach(), theirs.detach()) < 1e-12


@pytest.mark.parametrize("shape", [(6,), (4, 9), (4, 3, 2, 2)], ids=str)
def test_adam_mini_equals_its_paper(shape):
    options = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    weight, grads, w, g = case(shape)
    number = np.indices(shape)[0] if len(shape) > 1 else np.zeros(shape, dtype=int)
    got, _ = run(lambda p: AdamMini(p, **options), weight, grads)
    assert relative(got, oracle.adam_mini(w, g, number, **options)) < 1e-12


def test_adam_mini_has_a_number_per_head_of_queries_and_keys_and_per_row_of_the_rest():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 8) for _ in range(3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Embedding(5, 6), Attention()
            self.fused, self.head = nn.MultiheadAttention(6, 3), nn.Linear(6, 5)

    model = Model()
    optimizer = AdamMini(AdamMini.groups(model))
    named = dict(model.named_parameters())
    held = {
        name: [tuple(t.shape) for key, t in optimizer.state[p].items() if key.startswith("exp_avg_sq")]
        for name, p in named.items()
    }
    assert held["attention.q_proj.weight"] == held["attention.k_proj.weight"] == [(1, 2, 1)]
    assert held["attention.v_proj.weight"] == [(1, 8, 1)]
    assert held["fused.in_proj_weight"] == [(1, 3, 1), (1, 3, 1), (1, 6, 1)]
    assert held["embed.weight"] == held["head.weight"] == [(1, 5, 1)]
    assert held["attention.q_proj.bias"] == [(1, 1, 1)]
    weight = model.attention.q_proj.weight
    start, grad = weight.detach().double().numpy().copy(), torch.randn(8, 6)
    weight.grad = grad.clone()
    optimizer.step()
    number = np.indices((8, 6))[0] // 4
    want = oracle.adam_mini(
        start, [grad.double().numpy()], number, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    assert relative(weight.detach(), want) < 1e-6


def test_groups_without_a_view_are_still_adamw():
    param = nn.Parameter(torch.randn(4, 3))
    for make in PRESETS.values():
        optimizer = make([{"params": [param], "view": None}])
        assert set(optimizer.state[param]) - {"spike_sq"} == {"step", "exp_avg", "exp_avg_sq", "failures"}


# ---- one matrix per side -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "auto"])
def test_one_sided_shampoo_equals_its_paper(shape, side):
    weight, grads, w, g = case(shape)
    meant = side if side != "auto" else ("left" if shape[0] < shape[1] else "right")
    got, _ = run(lambda p: OneSidedShampoo(p, lr=0.3, eps=1e-3, side=side), weight, grads)
    assert relative(got, oracle.one_sided_shampoo(w, g, lr=0.3, eps=1e-3, side=meant)) < 1e-11


def test_one_sided_shampoo_is_the_theory_form_of_asgo_up_to_the_root_of_the_other_side():
    weight, grads = torch.randn(4, 9, dtype=torch.float64), gradients((4, 9), STEPS)
    ours, _ = run(lambda p: OneSidedShampoo(p, lr=0.3, eps=1e-14), weight, grads)
    asgo, _ = run(lambda p: ASGO.theory(p, lr=0.3 * 3, eps=1e-14), weight, grads)
    assert relative(ours, asgo) < 1e-6


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("betas", [(0.0, 1.0), (0.9, 1.0), (0.9, 0.95)], ids=str)
def test_shampoo_equals_its_paper(shape, betas):
    options = {"lr": 0.3, "betas": betas, "eps": 1e-3, "weight_decay": 0.05}
    weight, grads, w, g = case(shape)
    got, optimizer = run(lambda p: Shampoo(p, **options), weight, grads)
    assert relative(got, oracle.shampoo(w, g, **options)) < 1e-11
    if betas[1] == 1:  # the paper's Lemma 8: the full statistic is below the Kronecker product
        state = next(iter(optimizer.state.values()))
        left, right = (power(state[side][0].numpy() + 1e-3 * np.eye(k), 0.5) for side, k in zip(
            ("left", "right"), shape, strict=True))  # fmt: skip
        full = sum(np.outer(grad, grad) for grad in g) / min(shape)
        assert np.linalg.eigvalsh(np.kron(left, right) - full).min() > 0


def test_shampoo_leaves_a_long_side_alone():
    weight, grads, w, g = case((4, 9))
    got, optimizer = run(lambda p: Shampoo(p, lr=0.3, betas=(0.0, 1.0), eps=1e-3, max_size=5), weight, grads)
    assert relative(got, oracle.one_sided_shampoo(w, g, lr=0.1, eps=1e-3 / 9, side="left")) < 1e-11
    assert next(iter(optimizer.state.values()))["right"].numel() == 0


@pytest.mark.parametrize("make", [lambda p: OneSidedShampoo(p, 0.1), Shampoo, AdaBlock], ids=["one", "both", "blocks"])
def test_a_failed_root_keeps_the_last_good_one_and_is_counted(make, monkeypatch):
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = make([("w", param)])
    roots = lambda: [t.clone() for k, t in optimizer.state[param].items() if k.endswith("root")]  # noqa: E731

    def step():
        param.grad = torch.randn(4, 6)
        optimizer.step()

    step()
    kept = roots()

    def failing(A):
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    before = param.detach().clone()
    step()
    assert all(torch.equal(a, b) for a, b in zip(kept, roots(), strict=True))
    assert not torch.equal(before, param)
    assert optimizer.failures() == {"w": 1}
    monkeypatch.undo()
    step()
    assert not any(torch.equal(a, b) for a, b in zip(kept, roots(), strict=True))


ABSOLUTE = {
    "theory": lambda p: ASGO.theory(p, lr=0.1),
    "one-sided": lambda p: OneSidedShampoo(p, lr=0.01),
    "both sides": lambda p: Shampoo(p, lr=0.03),
    "blocks": lambda p: AdaBlock(p, lr=1e-3),
}


def regression(make, dtype, scale=1.0, spike=0.0, steps=50):
    """Losses of a linear map of normalised inputs, so its statistic is singular; one batch may have a heavy sample."""
    dice = torch.Generator().manual_seed(0)
    x = nn.functional.layer_norm(torch.randn(256, 32, generator=dice, dtype=torch.float64), (32,))
    y = x @ torch.randn(32, 48, generator=dice, dtype=torch.float64) / 6
    x, y, weight, losses = x.to(dtype), y.to(dtype), nn.Parameter(torch.zeros(48, 32, dtype=dtype)), []
    optimizer = make([weight])
    for step in range(steps + 1):
        square = (x @ weight.T - y).square()
        losses.append(float(square.detach().mean()))
        weights = 1 + spike * (step == 10) * (torch.arange(256)[:, None] == 0)
        optimizer.zero_grad()
        (scale * (weights * square).mean()).backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("make", ABSOLUTE.values(), ids=ABSOLUTE.keys())
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_absolute_damping_trains_in_float32_as_in_float64(make, scale):
    wide, narrow = (regression(make, dtype, scale)[-1] for dtype in (torch.float64, torch.float32))
    assert narrow == pytest.approx(wide, rel=0.01)


@pytest.mark.parametrize("make", ABSOLUTE.values(), ids=ABSOLUTE.keys())
@pytest.mark.parametrize("spike", [1e6, 1e7])
def test_absolute_damping_survives_a_spike_that_float32_cannot_hold_beside_the_rest(make, spike):
    """The spike hides the rest of the sum, so steps are shorter than in float64; the loss still falls."""
    losses = regression(make, torch.float32, spike=spike)
    assert losses[-1] < losses[12]
    assert max(losses[12:]) < losses[0]


def test_an_inverse_power_that_is_not_finite_touches_no_other():
    A = torch.diag_embed(torch.tensor([[4.0, 16.0], [float("nan"), 1.0], [0.0, 81.0]]))
    root, ok = inverse_power(A, 1e-12, 0.25)
    assert ok.tolist() == [True, False, True]
    assert torch.allclose(root[0], torch.diag(torch.tensor([4.0, 16.0]) ** -0.25))
    floor = RESOLUTION * torch.finfo(torch.float32).eps * 81
    assert torch.allclose(root[2], torch.diag(torch.tensor([floor**-0.25, 1 / 3])))


# ---- full-matrix AdaGrad in low rank --------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["psi", "bug", "eig"])
@pytest.mark.parametrize("rank", [1, 3, 11, None])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2)], ids=str)
def test_adagram_equals_its_paper(shape, rank, integrator):
    weight, grads, w, g = case(shape)
    options = {"lr": 0.3, "eps": 1e-2, "rank": rank, "integrator": integrator}
    assert (
        relative(run(lambda p: AdaGram(p, **options), weight, grads)[0], oracle.adagram_factor(w, g, **options)) < 1e-9
    )


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("integrator", ["bug", "eig"])
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_symmetric_adagram_equals_the_dense_formula(rank, integrator, compensate):
    weight, grads, w, g = case((3, 4))
    options = {"lr": 0.3, "eps": 1e-2, "rank": rank, "integrator": integrator, "compensate": compensate}
    got, _ = run(lambda p: AdaGram(p, direction="symmetric", **options), weight, grads)
    assert relative(got, oracle.adagram_symmetric(w, g, **options)) < 1e-9


@pytest.mark.parametrize("rank", [12, None])
def test_symmetric_adagram_with_enough_rank_is_full_matrix_adagrad(rank):
    weight, grads, w, g = case((3, 4))
    got, _ = run(lambda p: AdaGram(p, lr=0.3, eps=1e-2, rank=rank, direction="symmetric"), weight, grads)
    assert relative(got, oracle.full_matrix_adagrad(w, g, lr=0.3, eps=1e-2)) < 1e-12


def test_the_factor_without_a_limit_is_a_factor_of_the_statistic():
    """Identity 5: L L^T = G, and the direction has the length of G^(-1/2) g."""
    structure, grads = LowRankFactor(None, 1e-2, "psi"), gradients((1, 3, 4), 20)
    state = structure.init(grads[0])
    total = 1e-2 * torch.eye(12, dtype=torch.float64)
    for grad in grads:
        structure.update_statistic(state, structure.compute_statistic(grad), 1.0)
        total += torch.outer(grad.reshape(-1), grad.reshape(-1))
        direction = structure.precondition(state, grad)
        wanted = torch.as_tensor(power(total.numpy(), -0.5)) @ grad.reshape(-1)
        assert float(direction.norm()) == pytest.approx(float(wanted.norm()), rel=1e-12)
    small = 1e-3 * torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)  # no step is longer than 1
    stacked = {key: tensor.expand(12, *tensor.shape[1:]) for key, tensor in state.items()}
    inverse = 1e3 * structure.precondition(stacked, small).reshape(12, 12).mT
    assert torch.allclose(inverse @ total @ inverse.mT, torch.eye(12, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"integrator": i} for i in ("psi", "bug", "eig")] + [{"direction": "symmetric"}], ids=str
)
def test_adagram_is_exact_for_gradients_of_no_more_than_its_rank(options):
    weight = torch.zeros(15, dtype=torch.float64)
    span = torch.randn(3, 15, dtype=torch.float64)
    grads = [torch.randn(3, dtype=torch.float64) @ span for _ in range(STEPS)]
    limited, _ = run(lambda p: AdaGram(p, rank=3, **options), weight, grads)
    assert relative(limited, run(lambda p: AdaGram(p, rank=None, **options), weight, grads)[0]) < 1e-9


@pytest.mark.parametrize(("integrator", "sees"), [("psi", False), ("bug", False), ("eig", True)])
def test_splitting_overlooks_what_is_orthogonal_to_the_subspace(integrator, sees):
    eye = torch.eye(6, dtype=torch.float64)
    grads = [eye[0], eye[1], 100 * eye[2], eye[3]]
    _, optimizer = run(lambda p: AdaGram(p, rank=2, integrator=integrator), torch.zeros(6, dtype=torch.float64), grads)
    state = next(iter(optimizer.state.values()))
    assert (float((state["P"] @ state["Q"].mT)[0, 2, 2]) > 0.9) == sees


def test_the_factor_is_turned_and_may_ascend_where_the_symmetric_form_descends():
    basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    inputs = torch.stack(gradients((20,), 300)) * torch.logspace(0, -3, 20, dtype=torch.float64) @ basis
    ascents = {}
    for direction in ("factor", "symmetric"):
        param = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        optimizer, ascents[direction] = AdaGram([param], lr=0.3, eps=1e-6, rank=None, direction=direction), 0
        for x in inputs:
            param.grad = (x @ param.detach() - x.sum()) * x
            before = param.detach().clone()
            optimizer.step()
            ascents[direction] += float((param.detach() - before) @ param.grad) > 0
    assert ascents["factor"] > 10
    assert ascents["symmetric"] == 0


ADAGRAMS = [
    *({"rank": rank, "integrator": i} for rank in (1, 3) for i in ("psi", "bug", "eig")),
    {"rank": None},
    *({"rank": 3, "direction": "symmetric", "integrator": i} for i in ("bug", "eig")),
    {"rank": 3, "direction": "symmetric", "compensate": False},
    {"rank": None, "direction": "symmetric"},
]


@settings(max_examples=100, deadline=None)
@given(
    options=st.sampled_from(ADAGRAMS),
    powers=st.lists(st.integers(-10, 10), min_size=1, max_size=12),
    fresh=st.lists(st.booleans(), min_size=12, max_size=12),
    d=st.sampled_from([4, 30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_no_step_of_adagram_is_longer_than_lr(options, powers, fresh, d, dtype, seed):
    """Gradients of all sizes, the same direction again or another; the bound is 1 and the rounding of a norm of d."""
    param, generator = nn.Parameter(torch.zeros(d, dtype=dtype)), torch.Generator().manual_seed(seed)
    optimizer = AdaGram([param], lr=1.0, **options)
    direction = torch.randn(d, generator=generator, dtype=dtype)
    for power_of_ten, new in zip(powers * 3, fresh * 3, strict=False):
        direction = torch.randn(d, generator=generator, dtype=dtype) if new else direction
        param.grad = 10.0**power_of_ten * direction
        with torch.no_grad():
            param.zero_()
        optimizer.step()
        assert param.detach().double().norm() <= 1 + (d + 10) * torch.finfo(dtype).eps
    assert optimizer.failures() == {}


def test_a_decomposition_that_fails_keeps_the_statistic_and_is_counted(monkeypatch):
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    optimizer = AdaGram([("a", params[0]), ("b", params[1])], rank=2, direction="symmetric")

    def step():
        for i, p in enumerate(params):
            p.grad = torch.randn(3, 4) + 10 * i
        optimizer.step()

    step()
    kept = optimizer.state[params[1]]["basis"].clone()
    svd = torch.linalg.svd

    def failing(A, full_matrices):
        if A.abs().max() > 10:  # the second one
            raise torch.linalg.LinAlgError("no")
        return svd(A, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    before = [p.detach().clone() for p in params]
    step()
    assert torch.equal(kept, optimizer.state[params[1]]["basis"])
    assert optimizer.failures() == {"b": 1}
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    monkeypatch.undo()
    step()
    assert optimizer.failures() == {"b": 1}
    assert not torch.equal(kept, optimizer.state[params[1]]["basis"])


# ---- dense blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (2, 3)], ids=str)
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5, "gamma": 0.1}], ids=["free", "clipped"])
def test_adablock_equals_its_paper(shape, clip):
    options = {"lr": 0.03, "block_size": 4, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1, **clip}
    weight, grads, w, g = case(shape)
    got, _ = run(lambda p: AdaBlock(p, **options), weight, grads)
    assert relative(got, oracle.adablock(w, g, **options)) < 1e-9


def test_adablock_uses_its_blocks_in_turn_and_their_diagonal_between():
    options = {"lr": 0.03, "block_size": 4, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.0}
    weight, grads, w, g = case((6, 6))
    got, _ = run(lambda p: AdaBlock(p, precondition_frequency=3, stale="diagonal", **options), weight, grads)
    assert relative(got, oracle.adablock(w, g, blocks=lambda t: t <= 10 or t % 3 == 0, **options)) < 1e-9


def test_adablock_ends_as_momentum_sgd_when_its_bounds_have_closed():
    weight, grads = torch.zeros(6, 6, dtype=torch.float64), gradients((6, 6), 5)
    got, _ = run(lambda p: AdaBlock(p, lr=0.1, betas=(0.0, 0.9), clip=0.5, gamma=1e9), weight, grads)
    assert relative(got, -0.05 * sum(grads)) < 1e-6


def test_adablock_keeps_the_runs_of_a_convolution_within_kernels():
    weight, grads, w, g = case((4, 3, 2, 2))
    options = {"lr": 0.03, "block_size": 4, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.0}
    got, _ = run(lambda p: AdaBlock(p, **options), weight, grads)
    kernels = [grad.reshape(12, 4).T for grad in g]
    assert relative(got.reshape(12, 4).T, oracle.adablock(w.reshape(12, 4).T.copy(), kernels, **options)) < 1e-9


# ---- differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-5, 1e-14, 0.5])
def test_agd_equals_its_program(delta):
    options = {"lr": 0.03, "betas": (0.9, 0.99), "delta": delta, "weight_decay": 0.1}
    weight, grads, w, g = case((4, 9))
    assert relative(run(lambda p: AGD(p, **options), weight, grads)[0], oracle.agd(w, g, **options)) < 1e-12


def test_agd_is_momentum_sgd_where_nothing_changes():
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = AGD([weight], lr=1e-3, betas=(0.9, 0.5), delta=10.0)
    grad = torch.randn(5, dtype=torch.float64)
    for step in range(1, 60):
        weight.grad = grad.clone()
        optimizer.step()
        assert relative(weight.detach(), -step * 1e-3 / 10.0 * grad) < 1e-12


# ---- a wrapper ------------------------------------------------------------------------------------------------------


def spiky(shape, steps):
    grads = gradients(shape, steps)
    for t in range(5, steps, 20):
        grads[t][0] = 300.0
    return grads


@pytest.mark.parametrize(("interval", "warmup"), [(500, 150), (30, 10), (40, 0)])
def test_spam_around_adamw_equals_its_paper(interval, warmup):
    own = {"threshold": 50.0, "interval": interval, "warmup": warmup}
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    weight, grads = torch.randn(4, 3, dtype=torch.float64), spiky((4, 3), 90)
    group = {"view": None, **options}
    got, _ = run(lambda p: SPAM(ASGO([{**p[0], **group}]), **own), weight, grads)
    assert relative(got, oracle.spam(weight.numpy(), [g.numpy() for g in grads], **options, **own)) < 1e-12


def test_spam_clips_spikes_and_only_spikes():
    param, grads = nn.Parameter(torch.zeros(4, 3)), gradients((4, 3), 30, dtype=torch.float32)
    optimizer = SPAM(ASGO([param]))
    grads[5][1], grads[25][0] = 300.0, 300.0
    for t, grad in enumerate(grads):
        param.grad = grad.clone()
        optimizer.step()
        clipped = torch.zeros(4, 3, dtype=torch.bool)
        clipped[0] = t == 25  # the spike of step 5 comes before the clip is armed
        assert torch.equal(param.grad != grad, clipped), t


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_spam_resets_the_state_warms_up_and_gives_lr_back(lr):
    param = nn.Parameter(torch.zeros(4, 3))
    optimizer = SPAM(BAGM([param], lr=lr, betas=(0.0, 0.999), eps=1e-12), interval=4, warmup=2)
    sizes, grad = [], torch.randn(4, 3)
    for _ in range(9):
        param.grad, before = grad.clone(), param.detach().clone()
        optimizer.step()
        sizes.append(float((param.detach() - before).norm()))
        assert optimizer.param_groups[0]["lr"] is lr
    shares = [1, 1, 1, 0.01, 1 - 0.99 * 0.75, 1, 1, 0.01, 1 - 0.99 * 0.75]
    assert sizes == pytest.approx([sizes[0] * share for share in shares], rel=1e-3)
    assert optimizer.state[param]["step"] == 2
    assert optimizer.param_groups[0]["spam_step"] == 9


def test_spam_continues_from_a_checkpoint_by_name_and_refuses_one_without_it():
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [SPAM(ASGO(route(net)), 50.0, 5, 3) for net in nets]
    plain = checkpoint.named_state_dict(ASGO(route(nets[0])))

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()

    train(nets[0], optimizers[0], 7)
    nets[1].load_state_dict(nets[0].state_dict())
    checkpoint.load_named_state_dict(optimizers[1], checkpoint.named_state_dict(optimizers[0]))
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 5)
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))
    with pytest.raises(ValueError, match="nothing under 'spike_sq'"):
        checkpoint.load_named_state_dict(optimizers[0], plain)


def test_an_error_of_the_closure_leaves_lr_alone():
    param = nn.Parameter(torch.zeros(3))
    optimizer = SPAM(BAGM([param], lr=0.5), interval=1, warmup=1)
    param.grad = torch.ones(3)
    param.grad = param.grad.to_sparse()
    with pytest.raises(TypeError, match="is sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["spam_step"] == 0


def test_spam_runs_within_the_step_of_the_optimizer_and_follows_its_groups():
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    wrappers = [SPAM(ASGO(net.named_parameters()), 5.0, 25, 5) for net in nets]
    steps = [wrappers[0].step, wrappers[1].optimizer.step]
    for net, step, grow in zip(nets, steps, (wrappers[0], wrappers[1].optimizer), strict=True):
        torch.manual_seed(0)
        for t in range(60):
            if t == 7:
                net.gain = nn.Parameter(torch.ones(2, 3))
                grow.add_param_group({"params": [("gain", net.gain)]})
            grads = [torch.randn_like(p) * (300 if t in (22, 57) else 1) for p in net.parameters()]
            for param, grad in zip(net.parameters(), grads, strict=True):
                param.grad = grad
            step()
    for param, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(param, other)
    assert [group["spam_step"] for group in wrappers[1].param_groups] == [60, 60]


def test_spam_copies_whole_and_takes_a_step_without_groups():
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = SPAM(ASGO([param]), 5.0, 25, 5)
    twin = copy.deepcopy(optimizer)
    assert (twin.hook, twin.optimizer.step_hooks) == (optimizer.hook, (twin.hook,))
    optimizer.param_groups.clear()
    assert optimizer.step(lambda: 3.0) == 3.0


# ---- facts and names -----------------------------------------------------------------------------------------------


def test_every_preset_says_where_it_is_from_and_what_its_hyperparameters_may_be():
    for cls in (AGD, ASGO, BAG, BAGM, DASGO, SPAM, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo):
        assert cls.info.year >= 2018
        assert cls.info.lr > 0
        assert all((cls.info.paper, cls.info.memory, cls.info.cost))
        own = set(inspect.signature(cls.__init__).parameters) - {"self", "params", "optimizer", "adamw", "adjust_lr_fn"}
        assert own <= set(cls.constraints), cls


@pytest.mark.parametrize("make", [ASGO, DASGO, OneSidedShampoo, Shampoo])
def test_the_name_that_torch_gives_the_size_of_an_update_is_known(make):
    def build(**options):
        return make([nn.Parameter(torch.ones(2, 3))], lr=0.1, **options)

    torchs = build(adjust_lr=None, adjust_lr_fn="match_rms_adamw")
    assert torchs.param_groups[0].keys() == build().param_groups[0].keys()
    assert torchs.param_groups[0]["adjust_lr"] == "rms"
    assert build(adjust_lr="slice_rms").param_groups[0]["adjust_lr"] == "slice_rms"
    with pytest.raises(
        ValueError, match=f"^{make.__name__}: adjust_lr_fn must be None or one of 'match_rms_adamw'; got"
    ):
        build(adjust_lr_fn="original")


# ---- any model, any shape, and refusals ----------------------------------------------------------------------------


class Mixed(nn.Module):
    """Parameters of no, one, two, three and four axes."""

    def __init__(self):
        super().__init__()
        self.gain, self.attention = nn.Parameter(torch.ones(())), nn.MultiheadAttention(4, 2)
        self.experts, self.conv = nn.Parameter(torch.randn(3, 4, 5)), nn.Conv2d(2, 4, 3)

    def forward(self):
        inputs = torch.linspace(-1, 1, 12).reshape(3, 1, 4)
        attended = self.attention(inputs, inputs, inputs)[0]
        mixed = torch.einsum("sbm,emn->ebn", attended, self.experts).square().mean()
        return self.gain * (mixed + self.conv(torch.ones(1, 2, 4, 4)).square().mean())


@every_preset
@pytest.mark.parametrize("grouped", ["bare", "routed", "per head"])
def test_every_preset_takes_bare_and_routed_parameters_of_any_number_of_axes(make, grouped):
    torch.manual_seed(0)
    model = Mixed()
    groups = model.parameters() if grouped == "bare" else route(model, per_head=grouped == "per head")
    optimizer, losses = make(groups), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@every_preset
def test_a_step_mixes_no_devices_and_reads_no_values(make):
    """Tensors without values: reading one, which would wait for a device, raises; so does mixing in one of the CPU."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(6, 8), (6, 8), (7,), (4, 3, 2, 2)]]
    optimizer = make(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert {tensor.device.type for p in params for k, tensor in optimizer.state[p].items() if k != "step"} == {"meta"}


@every_preset
def test_hyperparameters_out_of_range_are_refused_by_every_preset(make):
    optimizer = make([nn.Parameter(torch.randn(3, 4))])
    who, count = type(getattr(optimizer, "optimizer", optimizer)).__name__, len(optimizer.param_groups)
    checked = {**BAD, **FAMILY_BAD}
    for key in set(optimizer.defaults) & set(checked):
        for value in checked[key]:
            with pytest.raises(ValueError, match=f"^{who}: {key} must be .*; got "):
                optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 4))], key: value})
    for key in set(checked) - set(optimizer.defaults):
        with pytest.raises(ValueError, match=f"^{who}: the key '{key}' of a group is not known"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 4))], "view": MATRIX, key: 7})
    assert len(optimizer.param_groups) == count


FAMILY_BAD = {
    "axis": ["diagonal", None, 0],
    "blocks": ["rows", 0, -1, True, 1.5, None],
    "rank": [0, -1, 2.0, True, "all"],
    "direction": ["both", None],
    "integrator": ["ksl", False],
    "compensate": [1, None],
    "max_size": [0, 2.5, True],
    "block_size": [0, 1.5, True],
    "stale": ["none", None],
    "clip": [0, -1.0, "x"],
    "gamma": [0, None],
    "delta": [0.0, -1.0, None],
}

REFUSED = {
    "blocks that do not divide": (
        lambda w: BAG([("w", w)], 0.1, blocks=4),
        r"with c=4 does not fit 'w' \(6, 8\): 6 is not a multiple of 4",
    ),
    "blocks of a view that does not fit": (
        lambda w: BAGM([("w", w)], blocks=View("(a r) n -> a r n", {"r": 5})),
        r"with r=5 does not fit 'w' \(6, 8\): 6 is not a multiple of 5",
    ),
    "kernels in a group with a view": (
        lambda w: BAGM([{"params": [w], "view": MATRIX}], blocks="kernel"),
        "blocks='kernel' reads parameters by views of its own, but a group has the view 'm n -> 1 m n'",
    ),
    "a number in a group with a view": (
        lambda w: BAGM([{"params": [w], "view": MATRIX, "blocks": 3}]),
        "blocks=3 reads parameters by views of its own",
    ),
    "a rank above every parameter": (
        lambda w: AdaGram([w, nn.Parameter(torch.randn(3))], rank=49),
        "AdaGram: rank=49 is above the 48 entries of the largest matrix: pass 48 or less, or None",
    ),
    "a rank above a group": (
        lambda w: AdaGram([{"params": [w]}, {"params": [nn.Parameter(torch.randn(3))], "rank": 4}]),
        "rank=4 is above the 3 entries",
    ),
    "an integrator that is not symmetric": (
        lambda w: AdaGram([w], direction="symmetric", integrator="psi"),
        "integrator 'psi' does not keep a matrix symmetric, .*: pass 'bug', 'eig' or None",
    ),
    "a threshold of nothing": (lambda w: SPAM(ASGO([w]), threshold=0), "SPAM: threshold must be a number > 0"),
    "an interval of nothing": (lambda w: SPAM(ASGO([w]), interval=0), "SPAM: interval must be a whole number of steps"),
    "a warm-up of half a step": (lambda w: SPAM(ASGO([w]), warmup=0.5), "SPAM: warmup must be a whole number of steps"),
    "wrapped twice": (lambda w: SPAM(SPAM(ASGO([w])).optimizer), "SPAM: the optimizer is wrapped already"),
    "an axis that does not exist": (lambda w: DASGO([w], axis="depth"), "DASGO: axis must be one of 'column', 'row'"),
}


def test_spam_wraps_optimizers_of_this_library():
    with pytest.raises(TypeError, match="SPAM wraps optimizers of this library, such as asgo.ASGO; got AdamW"):
        SPAM(torch.optim.AdamW([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.randn(6, 8)))
