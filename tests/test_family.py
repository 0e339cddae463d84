"""Every method against its paper in float64, the identities between them, and what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn

import oracle_family as oracle
from asgo import AGD, ASGO, BAG, BAGM, DASGO, AdamMini, OneSidedShampoo, Shampoo, View, route
from asgo.powers import inverse_power
from asgo.views import MATRIX, heads
from family import PRESETS, every_preset
from oracle import power
from test_asgo import gradients, relative, run
from test_optimizer import BAD

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
        assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq", "failures"}


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


@pytest.mark.parametrize("make", [lambda p: OneSidedShampoo(p, 0.1), lambda p: Shampoo(p, 0.1)], ids=["one", "both"])
def test_a_failed_root_keeps_the_last_good_one_and_is_counted(make, monkeypatch):
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = make([("w", param)])
    roots = lambda: [t.clone() for k, t in optimizer.state[param].items() if "root" in k]  # noqa: E731

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


def test_an_inverse_power_that_is_not_finite_touches_no_other():
    A = torch.diag_embed(torch.tensor([[4.0, 16.0], [float("nan"), 1.0], [0.0, 81.0]]))
    root, ok = inverse_power(A, 1e-12, 0.25)
    assert ok.tolist() == [True, False, True]
    assert torch.allclose(root[0], torch.diag(torch.tensor([4.0, 16.0]) ** -0.25))
    assert torch.allclose(root[2], torch.diag(torch.tensor([1e3, 1 / 3])))


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
def test_hyperparameters_out_of_range_are_refused_by_every_preset(make):
    optimizer = make([nn.Parameter(torch.randn(3, 4))])
    who, count = type(optimizer).__name__, len(optimizer.param_groups)
    checked = {**BAD, **FAMILY_BAD}
    for key in set(optimizer.defaults) & set(checked):
        for value in checked[key]:
            with pytest.raises(ValueError, match=f"^{who}: {key} must be .*; got "):
                optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 4))], key: value})
    for key in set(checked) - set(optimizer.defaults):
        with pytest.raises(ValueError, match=f"^{who}: the key '{key}' of a group is not known"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 4))], "view": MATRIX, key: 1})
    assert len(optimizer.param_groups) == count


FAMILY_BAD = {
    "axis": ["diagonal", None, 0],
    "blocks": ["rows", 0, -1, True, 1.5, None],
    "max_size": [0, 2.5, True],
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
    "an axis that does not exist": (lambda w: DASGO([w], axis="depth"), "DASGO: axis must be one of 'column', 'row'"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.randn(6, 8)))
