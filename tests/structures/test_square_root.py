"""The square-root form against float64: its statistic, its direction, what breaks other forms, and how it is called."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from asgo import ASGO, report
from asgo.diagnostics.step_memory import LiveBytes
from asgo.linalg import half_precision, polar
from asgo.linalg.polar import PLANS, Plan, polar_and_root
from asgo.structures import OneSided, SquareRoot, square_root
from asgo.structures.one_sided import to_gram
from asgo.structures.square_root import EPS, from_gram
from oracle import power

PRECISIONS = list(PLANS)
WIDE = {"fp32": torch.float32, "fp64": torch.float64}
"""The precisions that take the root of V itself."""
B2 = (0.0, 0.2, 0.8, 0.95)


def dtype_of(precision):
    return WIDE.get(precision, torch.float32)


def root_error(dtype, V):
    """Relative error of ``V^(-1/2) D`` by an eigendecomposition of V, which is exact for a V + E with E of the size of
    its damping and of k roundings each of V and of the decomposition; E counts by ``1 / lambda_min``, its root half.
    """
    values = np.linalg.eigvalsh(V)
    noise = EPS[dtype] + 2 * len(V) * torch.finfo(dtype).eps
    return noise * np.linalg.norm(V) / max(values[0], 1e-300)


def amplification(precision):
    """What the update of a direction that V lacks is multiplied by, relative to the root of ``||V||_F``."""
    return EPS[WIDE[precision]] ** -0.5 if precision in WIDE else PLANS[precision].amplification


def unit(plan):
    """Of a product: half precisions add up in float32, the others in themselves, over at most 32 terms here."""
    return torch.finfo(plan.dtype).eps / 2 * (1 if plan.dtype.itemsize < 4 else 32)


def rounding(plan):
    """Largest error of a singular value or direction of X by rounding.

    There are twelve roundings (of D, S, X three times, R twice, B, P, Q, the product X A^T and S as it is stored),
    twice the unit each. Those of the first step are magnified by all later ones where they take a large singular value
    to the lower end of their interval, and the Gram form magnifies that of its R by the condition of R.
    """
    return (24 + plan.condition + plan.amplification / plan.steps[0][0]) * unit(plan)


def step_error(plan):
    """Relative error of ``S S^T`` after one step: singular values within the tolerance of 1, squared, and rounding."""
    stored = max(unit(plan), torch.finfo(torch.bfloat16).eps / 2 if plan.dtype.itemsize < 4 else 0.0)
    return 2 * plan.tolerance + rounding(plan) + 2 * stored


def direction_error(plan, A):
    """Largest error of a direction of the polar factor of A: as above, and an error in A counts by 1 / sigma_min."""
    values = np.linalg.svd(A, compute_uv=False)
    least = values[-1] / np.linalg.norm(values)
    assert least > plan.low, "the bound is for matrices that the plan brings to 1"
    return plan.tolerance + rounding(plan) + 2 / least * unit(plan)


def stream(shape, count, seed=0, dtype=torch.float32, noise=0.2):
    """A drifting signal of rank 3 and noise."""
    generator = torch.Generator().manual_seed(seed)
    b, m, n = shape
    left, right = (torch.randn(b, size, 3, generator=generator, dtype=dtype) for size in (m, n))
    for _ in range(count):
        left = 0.98 * left + 0.2 * torch.randn(b, m, 3, generator=generator, dtype=dtype)
        yield left @ right.mT + noise * torch.randn(shape, generator=generator, dtype=dtype)


def exact(seen, beta2):
    """V of one matrix after each of these, in numpy's float64."""
    V = 0.0
    for G in (np.asarray(x, dtype=np.float64) for x in seen):
        V = V + G @ G.T if beta2 == 1 else beta2 * V + (1 - beta2) * G @ G.T
    return V


def root_of(V, D):
    """``V^(-1/2) D`` without damping."""
    return power(V, -0.5) @ np.asarray(D, dtype=np.float64)


def relative(found, wanted):
    found, wanted = (np.asarray(x, dtype=np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def run(structure, directions, beta2, seen=None):
    directions = list(directions)
    state, update = structure.init(directions[0]), None
    for D, G in zip(directions, directions if seen is None else seen, strict=True):
        update, ok = structure.update(state, D, D if seen is None else G, beta2)
        assert ok.all()
    return update, state


# ---- the polynomials


@pytest.mark.parametrize("name", PLANS)
def test_every_singular_value_above_low_comes_out_at_one(name):
    plan = PLANS[name]
    x = np.geomspace(plan.low, 1.0, 5001)
    for step in plan.steps:
        x = sum(c * x ** (2 * i + 1) for i, c in enumerate(step))
    assert np.abs(1 - x).max() == pytest.approx(plan.tolerance, rel=1e-2, abs=1e-14)
    assert plan.tolerance < {2: 2.0**-8, 4: 2.0**-15, 8: 2.0**-40}[plan.dtype.itemsize]


@pytest.mark.parametrize("name", PLANS)
def test_smaller_singular_values_come_out_smaller(name):
    plan = PLANS[name]
    x = start = np.geomspace(1e-3 * plan.low, plan.low, 2001)
    for step in plan.steps:
        x = sum(c * x ** (2 * i + 1) for i, c in enumerate(step))
    assert (x > 0).all()
    assert (x <= plan.amplification * start * (1 + 1e-12)).all()
    assert (x < 1 + plan.tolerance + 1e-9).all()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("size", [(4, 4), (4, 20)])
def test_products_are_counted(name, size):
    plan = PLANS[name]
    k, n = size
    with FlopCounterMode(display=False) as counter:
        polar.iterate(torch.zeros(1, k, n, dtype=plan.dtype), plan, n)
    assert counter.get_total_flops() == plan.products(k, n) * 2 * k**3


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"square root got precision='bf8': choose one of 'auto', 'bf16', .*'fp64'"):
        SquareRoot(precision="bf8").init(torch.zeros(1, 2, 3))


# ---- the statistic


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("beta2", "steps"), [(0.2, 100), (0.8, 200), (0.95, 1000)])
@pytest.mark.slow
def test_the_square_of_s_follows_the_statistic(precision, beta2, steps):
    """Within `step_error` of what one step makes of the last S, hence within ``step_error / (1 - b2)`` of V.

    The steps are at least 40 times the memory, 1 / (1 - b2) of them, at which a drift would have come to rest.
    """
    structure, plan = SquareRoot("left", precision), PLANS[precision]
    state, V = structure.init(torch.zeros(1, 12, 20, dtype=dtype_of(precision))), 0.0
    worst_step = worst = 0.0
    for t, D in enumerate(stream((1, 12, 20), steps, dtype=dtype_of(precision))):
        before, new = state["sqrt"][0].to(torch.float64, copy=True), D[0].double() @ D[0].double().T
        structure.update(state, D, D, beta2)
        S, V = state["sqrt"][0].double(), beta2 * V + (1 - beta2) * new
        worst_step = max(worst_step, relative(S @ S.T, beta2 * before @ before.T + (1 - beta2) * new))
        worst = max(worst, relative(S @ S.T, V)) if t % 10 == 9 else worst
    assert worst_step < step_error(plan)
    assert worst < step_error(plan) / (1 - beta2)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_sums_are_followed_too(precision):
    seen = list(stream((1, 6, 10), 200, dtype=dtype_of(precision)))
    update, state = run(SquareRoot("left", precision), seen, 1.0)
    S, V = state["sqrt"][0].double(), exact([G[0] for G in seen], 1.0)
    assert relative(S @ S.T, V) < 200 * step_error(PLANS[precision])
    assert relative(update[0], root_of(V, seen[-1][0])) < 200 * step_error(PLANS[precision])


@pytest.mark.parametrize("beta2", [0.2, 0.95])
def test_damping_of_the_root_does_not_add_up_in_s(beta2, monkeypatch):
    """Up to k roundings each of V and of its decomposition in every step: S is the root of V, not of V + eps."""
    monkeypatch.setitem(EPS, torch.float64, 1e-3)
    sizes = torch.logspace(0, -4, 6, dtype=torch.float64)[:, None]
    directions = [sizes * D for D in stream((1, 6, 10), 200, dtype=torch.float64)]
    _, state = run(SquareRoot("left", "fp64"), directions, beta2)
    S, V = state["sqrt"][0], exact([D[0] for D in directions], beta2)
    rounding = 2 * 6 * torch.finfo(torch.float64).eps / (1 - beta2)
    assert relative(S @ S.T, V) < rounding
    least = np.linalg.eigvalsh(V)[0]
    assert least < 1e-7 * np.linalg.norm(V)
    assert abs(np.linalg.eigvalsh(S @ S.T)[0] - least) < rounding * np.linalg.norm(V)


def test_s_is_symmetric_and_half_as_large_as_a_float():
    _, state = run(SquareRoot("left", "bf16"), stream((2, 6, 10), 5), 0.5)
    assert torch.equal(state["sqrt"], state["sqrt"].mT)
    assert state["sqrt"].dtype == torch.bfloat16
    kept = {
        key: SquareRoot(precision=precision, keep=keep).init(torch.zeros(1, 2, 3, dtype=dtype))["sqrt"].dtype
        for key, (precision, keep, dtype) in {
            "half": ("fp16", "auto", torch.float32),
            "asked": ("bf16", "fp32", torch.float32),
            "single": ("fp32", "auto", torch.float32),
            "double": ("auto", "auto", torch.float64),
        }.items()
    }
    assert kept == {"half": torch.bfloat16, "asked": torch.float32, "single": torch.float32, "double": torch.float64}


# ---- the direction


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("beta2", B2)
def test_the_direction_is_that_of_the_exact_root(precision, beta2):
    seen = list(stream((1, 10, 16), 12, dtype=dtype_of(precision), noise=1.0))
    structure, plan = SquareRoot("left", precision), PLANS[precision]
    _, state = run(structure, seen[:-1], beta2)
    S = state["sqrt"][0].double().numpy()
    A = np.hstack([math.sqrt(1 - beta2) * seen[-1][0].double().numpy(), math.sqrt(beta2) * S])
    update, _ = structure.update(state, seen[-1], seen[-1], beta2)
    u, _, vh = np.linalg.svd(A, full_matrices=False)
    wanted = (u @ vh)[:, :16] / math.sqrt(1 - beta2)
    error = np.linalg.norm(update[0].double().numpy() - wanted, 2) * math.sqrt(1 - beta2)
    assert error < direction_error(plan, A)
    cosine = (update[0].double().numpy() * wanted).sum() / np.linalg.norm(update[0].double()) / np.linalg.norm(wanted)
    size = np.linalg.norm(wanted) * math.sqrt((1 - beta2) / 10)  # of the polar factor's block, per direction
    assert 1 - cosine < 0.5 * (direction_error(plan, A) / size) ** 2 * 1.1 + 1e-15


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_memory_it_is_muon(side):
    D = next(stream((3, 5, 8), 1, dtype=torch.float64))
    update, state = run(SquareRoot(side), [D], 0.0)
    u, _, vh = torch.linalg.svd(D, full_matrices=False)
    for i in range(3):
        V = (D[i] @ D[i].mT if side == "left" else D[i].mT @ D[i]).numpy()
        assert relative(update[i], (u @ vh)[i]) < root_error(torch.float64, V)
    assert not state["sqrt"].any(), "S has no part in it and stays"


def test_the_first_step_is_muon_with_the_weight_of_one_measurement():
    D = next(stream((1, 5, 8), 1, dtype=torch.float64))
    update, state = run(SquareRoot("left"), [D], 0.8)
    u, _, vh = torch.linalg.svd(D, full_matrices=False)
    assert torch.allclose(update, u @ vh / math.sqrt(0.2), atol=1e-12)
    assert torch.allclose(state["sqrt"] @ state["sqrt"], 0.2 * D @ D.mT, atol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("beta2", [0.0, 0.2, 0.95])
def test_no_row_is_longer_than_one_measurement_allows(precision, beta2):
    """``V >= (1 - b2) D D^T``: what keeps steps bounded whatever comes: spikes of 1e4, dead units that wake."""
    structure, plan = SquareRoot("left", precision), PLANS[precision]
    state = structure.init(torch.zeros(1, 8, 12, dtype=dtype_of(precision)))
    limit = (1 + plan.tolerance + rounding(plan)) / math.sqrt(1 - beta2)
    for t, D in enumerate(stream((1, 8, 12), 120, dtype=dtype_of(precision))):
        D.mul_(1e4 if t % 40 == 20 else 1.0)[:, :2] *= float(t > 60)
        update, ok = structure.update(state, D, D, beta2)
        assert ok.all()
        assert torch.linalg.matrix_norm(update, 2).max() < limit * (1 + 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stack_gives_what_each_matrix_gives_alone(precision):
    structure, dtype = SquareRoot("left", precision, cross_normalize=True), dtype_of(precision)
    seen = list(stream((3, 6, 9), 6, dtype=dtype))
    together, state = run(structure, seen, 0.5)
    for i in range(3):
        alone, own = run(structure, [D[i : i + 1] for D in seen], 0.5)
        tolerance = 50 * torch.finfo(PLANS[precision].dtype).eps
        if precision in WIDE:
            tolerance = root_error(dtype, exact([D[i] for D in seen], 0.5))
        assert relative(together[i], alone[0]) < tolerance
        assert relative(state["sqrt"][i].double(), own["sqrt"][0].double()) < tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("least", [0, math.inf])
def test_an_update_in_the_place_of_the_direction_is_the_same(precision, statistic, side, least, monkeypatch):
    """Of a stack at once, and of its matrices one after the other, one of which is zero and one NaN."""
    monkeypatch.setattr(square_root, "APART", least)
    structure = SquareRoot(side, precision, cross_normalize=True)
    (D, G), found = stream((4, 5, 7), 2), []
    for x in (D, G):
        x[1], x[2] = 0.0, math.nan
    for in_place in (False, True):
        state, direction = structure.init(D), D.clone()
        seen, out = direction if statistic == "momentum" else G, direction if in_place else None
        update, ok = structure.update(state, direction, seen, 0.5, out)
        assert update.data_ptr() == direction.data_ptr() if in_place else torch.equal(direction[0], D[0])
        assert ok.tolist() == [True, True, False, True]
        found.append([update, *state.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_matrices_one_after_the_other_are_a_stack(precision, monkeypatch):
    seen = list(stream((3, 5, 7), 4, dtype=dtype_of(precision)))
    found = []
    for least in (0, math.inf):
        monkeypatch.setattr(square_root, "APART", least)
        update, state = run(SquareRoot("left", precision), seen, 0.5)
        found.append((update, state["sqrt"].to(update.dtype)))
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < rounding(PLANS[precision])


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
def test_both_sides_mirror_each_other(precision, statistic):
    dtype = dtype_of(precision)
    left, right = (list(stream((2, 6, 9), 5, seed=seed, dtype=dtype, noise=1.0)) for seed in (0, 1))
    seen = None if statistic == "momentum" else right
    one, _ = run(SquareRoot("left", precision), left, 0.5, seen)
    mirrored = None if seen is None else [G.mT.contiguous() for G in seen]
    other, _ = run(SquareRoot("right", precision), [D.mT.contiguous() for D in left], 0.5, mirrored)
    assert relative(one, other.mT) < 400 * torch.finfo(PLANS[precision].dtype).eps


# ---- the gradient statistic


@pytest.mark.parametrize("beta2", [0.0, 0.8, 1.0])
def test_a_gradient_statistic_preconditions_another_direction(beta2):
    directions, gradients = (list(stream((1, 5, 8), 9, seed=s, dtype=torch.float64, noise=1.0)) for s in (0, 1))
    update, _ = run(SquareRoot("left"), directions, beta2, gradients)
    V = exact([G[0] for G in gradients], beta2)
    assert relative(update[0], root_of(V, directions[-1][0])) < 1e-9


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_direction_that_the_statistic_lacks_is_amplified_no_more_than_damping_allows(precision, rank):
    """Relative to ``||V||_F``, as by the eps of any other root."""
    structure, plan = SquareRoot("left", precision), PLANS[precision]
    G, D = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)
    G[0, :rank, :rank], D[0, 3, 1] = torch.eye(rank) * 3.0, 2.0
    update, ok = structure.update(structure.init(D), D, G, 0.75)
    assert ok.all()
    wanted = 2.0 * amplification(precision) / (3.0 * 0.5 * rank**0.25)
    assert update[0, 3, 1] == pytest.approx(wanted, rel=len(plan.steps) * 4 * unit(plan))


@pytest.mark.parametrize("units", [True, False])
def test_the_precision_follows_the_device(units, monkeypatch):
    """What is on "meta" is taken for what will be on the CPU, so that its memory is known before."""
    monkeypatch.setitem(half_precision.UNITS, torch.bfloat16, units)
    found = {name: polar.plan_for("auto", torch.float32, torch.device(name)) for name in ("cpu", "meta", "cuda", "xpu")}
    on_cpu = PLANS["bf16" if units else "fp32"]
    assert found == {"cpu": on_cpu, "meta": on_cpu, "cuda": PLANS["fp16"], "xpu": PLANS["bf16"]}
    assert polar.plan_for("auto", torch.float64, torch.device("cuda")) == PLANS["fp64"]


def test_what_is_carried_along_is_not_in_bfloat16_unless_asked(monkeypatch):
    monkeypatch.setitem(half_precision.UNITS, torch.bfloat16, True)
    like = torch.zeros(1, 2, 3)
    chosen = {
        precision: [SquareRoot(precision=precision).plan(like, carried) for carried in (False, True)]
        for precision in ("auto", "bf16", "fp16")
    }
    assert chosen == {
        "auto": [PLANS["bf16"], PLANS["fp32"]],
        "bf16": [PLANS["bf16"]] * 2,
        "fp16": [PLANS["fp16"]] * 2,
    }


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_deep_plan_damps_less_and_is_better_conditioned(kind):
    deep, usual = PLANS[f"{kind}_deep"], PLANS[kind]
    assert deep.amplification > 3 * usual.amplification
    assert deep.condition < usual.condition
    assert deep.tolerance < usual.tolerance


# ---- what breaks other forms


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
def test_zero_leaves_everything_as_it_is(precision, statistic):
    structure, dtype = SquareRoot("left", precision, cross_normalize=True), dtype_of(precision)
    for before in ([], list(stream((2, 4, 6), 3, dtype=dtype))):
        state = structure.init(torch.zeros(2, 4, 6, dtype=dtype))
        for D in before:
            structure.update(state, D, D, 0.5)
        kept = {key: x.clone() for key, x in state.items()}
        D = torch.zeros(2, 4, 6, dtype=dtype)
        update, ok = structure.update(state, D, D if statistic == "momentum" else D.clone(), 0.5)
        assert ok.all()
        assert not update.any()
        assert all(torch.equal(state[key], kept[key]) for key in state)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_expert_that_rests_keeps_its_state_and_the_others_do_not_notice(precision):
    structure = SquareRoot("left", precision)
    seen = list(stream((3, 6, 9), 8, dtype=dtype_of(precision)))
    resting = [D.clone() for D in seen]
    for D in resting[4:]:
        D[1] = 0
    update, state = run(structure, resting, 0.5)
    full, other = run(structure, seen, 0.5)
    _, early = run(structure, seen[:4], 0.5)
    assert torch.equal(state["sqrt"][1], early["sqrt"][1])
    assert not update[1].any()
    assert torch.equal(update[::2], full[::2])
    assert torch.equal(state["sqrt"][::2], other["sqrt"][::2])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
def test_a_matrix_with_nan_is_counted_and_touches_nothing(precision, bad, statistic):
    structure, dtype = SquareRoot("left", precision, cross_normalize=True), dtype_of(precision)
    seen = list(stream((3, 4, 6), 4, dtype=dtype))
    state = run(structure, seen[:3], 0.5)[1]
    kept = {key: x.clone() for key, x in state.items()}
    D, G = seen[3].clone(), seen[3].clone()
    G[1, 2, 3] = bad
    update, ok = structure.update(state, G if statistic == "momentum" else D, G, 0.5)
    assert ok.tolist() == [True, False, True]
    assert update.isfinite().all()
    assert not update[1].any()
    assert all(torch.equal(state[key][1], kept[key][1]) for key in state)
    assert not torch.equal(state["sqrt"][0], kept["sqrt"][0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("exponent", [100, -100])
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
def test_the_size_of_gradients_does_not_matter(precision, exponent, statistic):
    """2^100 is 1e30. A power of two changes no bit of an update, and S by that power."""
    structure, dtype = SquareRoot("left", precision), dtype_of(precision)
    directions, gradients = (list(stream((2, 5, 7), 4, seed=seed, dtype=dtype)) for seed in (0, 1))
    gradients = None if statistic == "momentum" else gradients
    update, state = run(structure, directions, 0.5, gradients)
    scaled = [[torch.ldexp(x, torch.tensor(exponent)) for x in xs] for xs in (directions, gradients or directions)]
    again, other = run(structure, scaled[0], 0.5, None if gradients is None else scaled[1])
    assert torch.equal(again, update)
    assert torch.equal(other["sqrt"], torch.ldexp(state["sqrt"], torch.tensor(exponent)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rank_one_gives_its_direction(precision):
    plan = PLANS[precision]
    dice = torch.Generator().manual_seed(0)
    u, v = (torch.randn(shape, generator=dice, dtype=torch.float64) for shape in ((12, 1), (1, 20)))
    D = (u @ v)[None].to(dtype_of(precision))
    update, _ = run(SquareRoot("left", precision), [D], 0.5)
    wanted = (u @ v / u.norm() / v.norm() / math.sqrt(0.5)).numpy()
    along = float((update[0].double().numpy() * wanted).sum()) / 2  # 2 is the square of its norm
    # Beside it is the rounding of D's entries, and of eigenvectors, amplified at most as damping allows.
    noise = amplification(precision) * 4 * unit(plan)
    assert abs(1 - along) < step_error(plan) + noise * (precision in WIDE)
    assert np.linalg.norm(update[0].double().numpy() - along * wanted) * math.sqrt(0.5) < noise + 1e-12


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_spike_is_forgotten_as_fast_as_by_the_statistic(precision):
    structure, plan, beta2 = SquareRoot("left", precision), PLANS[precision], 0.5
    calm = list(stream((1, 8, 12), 60, noise=1.0, dtype=dtype_of(precision)))
    spiked = [D.clone() for D in calm]
    spiked[5] *= 1e4
    state, errors = structure.init(calm[0]), []
    for t, D in enumerate(spiked):
        update, _ = structure.update(state, D, D, beta2)
        wanted = root_of(exact([x[0] for x in spiked[: t + 1]], beta2), D[0])
        errors.append(relative(update[0], wanted))
    _, other = run(structure, calm, beta2)
    exactly = [power(exact([x[0] for x in seen], beta2), 0.5) for seen in (spiked, calm)]
    assert relative(state["sqrt"].double(), other["sqrt"].double()) < 2 * step_error(plan) + 1.01 * relative(*exactly)
    assert errors[-1] < 4 * max(errors[:5])


def test_an_iteration_that_diverges_is_counted():
    plan = Plan(torch.float32, 1e-3, ((50.0, 3.0, 1.0),) * 5)
    X, S, _, ok = polar_and_root([(torch.randn(2, 4, 6), 1.0)], plan)
    assert not ok.any()
    assert not X.any()
    assert not S.any()


def test_no_matrices_and_no_rows_are_fine():
    for shape in ((0, 3, 4), (2, 0, 4)):
        update, ok = SquareRoot("left", "bf16").update(
            SquareRoot("left", "bf16").init(torch.zeros(shape)), torch.zeros(shape), torch.zeros(shape), 0.5
        )
        assert update.shape == shape
        assert len(ok) == shape[0]


# ---- how it is called


def split_columns(x, parts=2):
    return x.chunk(parts, dim=2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
@pytest.mark.parametrize("beta2", [0.0, 0.5, 1.0])
def test_shards_whose_measurements_are_summed_step_as_the_whole(side, statistic, beta2):
    structure, dim = SquareRoot(side, cross_normalize=True), 2 if side == "left" else 1
    directions, gradients = (list(stream((2, 6, 6), 5, seed=s, dtype=torch.float64, noise=1.0)) for s in (0, 1))
    seen = directions if statistic == "momentum" else gradients
    assert structure.is_shard_additive("columns" if side == "left" else "rows", 6, 6)
    whole = structure.init(directions[0])
    shards = [structure.init(x) for x in directions[0].chunk(2, dim)]
    for D, G in zip(directions, seen, strict=True):
        update, _ = structure.update(whole, D, D if statistic == "momentum" else G, beta2)
        R = sum(structure.compute_statistic(x) for x in G.chunk(2, dim))
        results = [
            structure.update_from(state, x, R, beta2, lambda norms: norms)
            for state, x in zip(shards, D.chunk(2, dim), strict=True)
        ]
        assert all(ok.all() for _, ok in results)
        assert relative(torch.cat([x for x, _ in results], dim), update) < 1e-10
        assert torch.equal(shards[0]["sqrt"], shards[1]["sqrt"])
    assert relative(shards[0]["sqrt"], whole["sqrt"]) < 1e-10 if beta2 else not shards[0]["sqrt"].any()


@pytest.mark.parametrize("beta2", [0.5, 1.0])
def test_the_four_calls_of_every_structure_do_the_same(beta2):
    structure = SquareRoot("left", cross_normalize=True)
    state = structure.init(torch.zeros(2, 4, 6, dtype=torch.float64))
    seen = list(stream((2, 4, 6), 5, dtype=torch.float64))
    for D in seen:
        structure.update_statistic(state, structure.compute_statistic(D), beta2)
        assert structure.compute_root(state).all()
        update = structure.precondition(state, D)
    wanted, other = run(structure, seen, beta2)
    assert relative(update, wanted) < 1e-6
    assert relative(state["sqrt"], other["sqrt"]) < 1e-10


def test_a_state_of_gram_and_root_goes_on_as_a_square_root_and_back():
    seen = list(stream((2, 4, 6), 6, dtype=torch.float64))
    old, new = OneSided("left", cross_normalize=True), SquareRoot("left", cross_normalize=True)
    state = old.init(seen[0])
    for D in seen[:3]:
        old.update_statistic(state, old.compute_statistic(D), 0.5)
    state = from_gram(state | {"exp_avg": seen[0]}, torch.float64)
    assert set(state) == {"exp_avg", "cross", "cross_weight", "sqrt"}
    for D in seen[3:]:
        new.update(state, D, D, 0.5)
    state = to_gram(state, torch.float64, 1e-12)
    assert set(state) == {"exp_avg", "cross", "cross_weight", "gram", "root"}
    for i in range(2):
        V = exact([D[i] for D in seen], 0.5)
        assert relative(state["gram"][i], V) < 1e-9
        assert relative(state["root"][i], power(V, -0.5)) < 1e-9


FORMS = {
    "bf16": SquareRoot("left", "bf16", cross_normalize=True),
    "fp16_fast": SquareRoot("right", "fp16_fast"),
    "fp32": SquareRoot("left", "fp32", cross_normalize=True),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("beta2", [0.0, 0.5, 1.0])
def test_nothing_reads_the_device(name, beta2):
    """A tensor without data has nothing to read."""
    like, structure = torch.zeros(2, 4, 6, device="meta"), FORMS[name]
    state = structure.init(like)
    for seen in (like, torch.zeros_like(like)):
        update, ok = structure.update(state, like, seen, beta2)
        assert (update.shape, update.dtype, ok.shape) == (like.shape, torch.float32, (2,))
    update, ok = structure.update_from(state, like, structure.compute_statistic(like), beta2)
    assert (update.shape, update.dtype, ok.shape) == (like.shape, torch.float32, (2,))


class Calls(TorchDispatchMode):
    """Counts operations that launch something, and products among them."""

    VIEWS = (
        "view",
        "slice",
        "transpose",
        "unsqueeze",
        "select",
        "diagonal",
        "split",
        "alias",
        "expand",
        "promote_types",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self):
        return sum(name.strip("_") not in self.VIEWS for name in self.names), sum("bmm" in name for name in self.names)


@pytest.mark.parametrize(("precision", "n", "products"), [("bf16", 8, 17), ("bf16", 32, 25), ("fp16", 8, 17),
                                                          ("bf16_fast", 8, 15), ("fp32", 32, 22)])  # fmt: skip
def test_a_stack_of_any_size_takes_few_launches(precision, n, products):
    """On a device: products of whole stacks, those with a long side in slices of 2 k columns."""
    found = []
    for b in (1, 100):
        D, structure = torch.zeros(b, 8, n, device="meta"), SquareRoot("left", precision)
        state = structure.init(D)
        with Calls() as calls:
            structure.update(state, D, D, 0.5)
        found.append(calls.count())
    assert found[0] == found[1]
    assert found[0][1] == products
    assert found[0][0] < 165


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_memory_of_an_update_is_bounded(precision, side, monkeypatch):
    """In ``k x k`` matrices of float32, with the update itself. At n = k 4: A, X and a new X in half precision, R, B;
    or V, its eigenvectors and both roots. At n = 4k 4 for the update and 3 beside it."""
    monkeypatch.setattr(half_precision, "UNITS", dict.fromkeys(half_precision.UNITS, True))
    k = 192
    for n, most in ((k, 4.5), (4 * k, 7.1)):
        D, structure = torch.randn((1, k, n) if side == "left" else (1, n, k)), SquareRoot(side, precision)
        state = structure.init(D)
        for _ in range(2):
            with LiveBytes() as live:
                structure.update(state, D, D, 0.5)
        assert live.peak <= most * 4 * k * k
        param = ("w", torch.nn.Parameter(D[0]))
        step = report(ASGO([param], root="square_root", precision=precision)).step_bytes
        exact = report(ASGO([param], root="eigh")).step_bytes
        assert step <= (6 * 4 * k * k if n == k else 1.001 * exact)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("n", [32, 128])
def test_the_step_of_a_stack_takes_twice_its_size(precision, n, monkeypatch):
    """The direction, which the update takes the place of, the squares of the update, and what one matrix needs."""
    monkeypatch.setattr(square_root, "APART", 0)
    params = [(f"w{i}", torch.nn.Parameter(torch.randn(32, n))) for i in range(20)]
    step = report(ASGO(params, root="square_root", precision=precision)).step_bytes
    assert step <= 2.1 * sum(p.nbytes for _, p in params)


@pytest.mark.parametrize("beta2", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("statistic", ["momentum", "gradient"])
def test_one_graph_holds_it(beta2, precision, statistic):
    structure = SquareRoot("left", precision, cross_normalize=True)
    D, G = stream((2, 4, 24), 2)
    G = D if statistic == "momentum" else G
    states = [structure.init(D) for _ in range(2)]
    compiled = torch.compile(structure.update, fullgraph=True, backend="eager")
    assert torch.equal(compiled(states[0], D, G, beta2)[0], structure.update(states[1], D, G, beta2)[0])
    assert torch.equal(states[0]["sqrt"], states[1]["sqrt"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.slow
def test_a_whole_step_is_compiled_once(precision):
    torch._dynamo.reset()
    counter, results = CompileCounter(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (4, 6))]
        named = [(f"w{i}", p) for i, p in enumerate(params)]
        optimizer = ASGO(named, lr=torch.tensor(0.01), root="square_root", precision=precision, capturable=True)
        step, counts = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step, []
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            step()
            counts.append(counter.frame_count)
        results.append([p.detach() for p in params])
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 4
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5)


def test_autocast_does_not_touch_it():
    D, structure = next(stream((1, 4, 6), 1)), SquareRoot("left", "fp32")
    plain, _ = run(structure, [D], 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = run(structure, [D], 0.5)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_symmetric_product_by_panels_is_the_whole_one(dtype, units, monkeypatch):
    monkeypatch.setattr(half_precision, "SMALLEST_WITH_PANELS", dict.fromkeys((torch.bfloat16, torch.float32), (8, 0)))
    monkeypatch.setattr(half_precision, "UNITS", dict.fromkeys(half_precision.UNITS, units))
    X, C = torch.randn(2, 9, 12).to(dtype), torch.randn(2, 9, 9).to(dtype)
    C, tolerance = half_precision.mirrored(C), 2 * torch.finfo(dtype).eps
    wanted = X.double() @ X.double().mT
    assert relative(half_precision.symmetric(X).double(), wanted) < tolerance
    assert relative(half_precision.symmetric(X, X, C, 0.5, 2.0).double(), 0.5 * C.double() + 2.0 * wanted) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_units_a_product_is_that_in_float32_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(half_precision, "UNITS", dict.fromkeys(half_precision.UNITS, False))
    X, B = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 5, 5).to(dtype)
    wanted = torch.baddbmm(X.float(), B.float(), X.float(), beta=1.5).to(dtype)
    assert torch.equal(half_precision.multiply(X, B, 1.5), wanted)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("c", [0.0, 1.5])
def test_a_product_with_a_wide_matrix_is_the_same_in_its_memory(turned, c):
    X, B = torch.randn(2, 4, 21), half_precision.mirrored(torch.randn(2, 4, 4))
    X = X.mT.contiguous().mT if turned else X
    wanted = torch.baddbmm(X, B, X, beta=c)
    result = half_precision.multiply(X, B, c)
    assert result is X
    torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_root_by_a_cholesky_factor_is_the_root(precision):
    """What devices take on which eigendecompositions are slow: with `carried` directions of any size."""
    plan, dtype = PLANS[precision], dtype_of(precision)
    V = torch.stack([x @ x.mT for x in next(stream((3, 10, 16), 1, noise=1.0, dtype=dtype))])
    Z, ok = polar.cholesky_root(plan)(V, EPS[dtype])
    assert ok.all()
    for i in range(3):
        error = root_error(dtype, V[i].double().numpy()) + plan.tolerance + rounding(plan)
        L = np.linalg.cholesky(V[i].double().numpy())
        assert np.linalg.norm(Z[i].double().numpy() @ L - power(V[i].double().numpy(), -0.5) @ L, 2) < error + (
            direction_error(plan, L) - plan.tolerance - rounding(plan)
        )


def test_the_square_root_by_a_cholesky_factor_has_little_of_the_damping(monkeypatch):
    """``S^2 = V + d^2 / (4 (V + d))``: a quarter of d where V is 0, next to nothing where it is large."""
    monkeypatch.setitem(EPS, torch.float64, 1e-3)
    D = next(stream((1, 6, 10), 1, dtype=torch.float64)) * torch.logspace(0, -4, 6, dtype=torch.float64)[:, None]
    V = D @ D.mT
    _, S, ok = SquareRoot("left", "fp64")._by_cholesky(V.clone())
    assert ok.all()
    assert torch.equal(S, S.mT)
    d = 1e-3 * V[0].norm() * torch.eye(6, dtype=torch.float64)
    assert relative(S[0] @ S[0], V[0] + d @ d @ torch.linalg.inv(V[0] + d) / 4) < 1e-12


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_root_by_a_cholesky_factor_keeps_the_rules_of_roots(precision):
    x = torch.randn(4, 6, 9)
    V = x @ x.mT
    V[1], V[2, 3, 4] = 0, math.nan
    V[3] = x[3, :, :1] @ x[3, :, :1].mT  # rank one
    Z, ok = polar.cholesky_root(PLANS[precision])(V, 1e-6)
    assert ok.tolist() == [True, True, False, True]
    assert Z.isfinite().all()
    assert not Z[1].any()
    assert not Z[2].any()
    assert torch.linalg.matrix_norm(Z[3], 2) < 1.1 * 1e3 / V[3].norm().sqrt()
    scaled, _ = polar.cholesky_root(PLANS[precision])(torch.ldexp(V, torch.tensor(80)), 1e-6)
    assert torch.equal(scaled, torch.ldexp(Z, torch.tensor(-40)))


@pytest.mark.parametrize("options", [{}, {"statistic": "gradient"}, {"betas": (0.9, 0.0)}], ids=str)
def test_the_report_knows_the_square_root_and_the_memory_of_its_step(options):
    params = [("w", torch.nn.Parameter(torch.randn(8, 12)))]
    found = report(ASGO(params, root="square_root", **options))
    assert [row.structure for row in found.rows] == ["SquareRoot 1x8x8"]
    assert found.step_bytes is not None
    assert found.step_bytes > 0
