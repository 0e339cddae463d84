"""Laws that every structure obeys. A new structure is one more row of the table."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import asgo.structures
from asgo.linalg.inverse_root import TOLERANCE
from asgo.structures import (
    Algebra,
    BlockDiagonal,
    BlockMean,
    LowRankFactor,
    LowRankSymmetric,
    MomentumChange,
    OneSided,
    Packed,
    SquareRoot,
    TwoSided,
)
from asgo.structures.base import norms_along

ONE_SIDED = {
    "left": OneSided("left"),
    "right": OneSided("right"),
    "auto": OneSided("auto"),
    "left, cross": OneSided("left", cross_normalize=True),
    "right, cross": OneSided("right", cross_normalize=True),
    "auto, cross": OneSided("auto", cross_normalize=True),
    "left, mean": OneSided("left", mean=True),
    "right, mean": OneSided("right", mean=True),
}
STRUCTURES = ONE_SIDED | {
    "one number": BlockMean("matrix", 1e-12),
    "rows": BlockMean("row", 1e-12),
    "columns": BlockMean("column", 1e-12),
    "entries": BlockMean("entry", 1e-12),
    "fewer": BlockMean("auto", 1e-12),
    "columns, total": BlockMean("column", 1e-12, total=True, inside=True),
    "one number, total": BlockMean("matrix", 1e-12, total=True),
    "rows, total": BlockMean("row", 1e-12, total=True),
    "rows, corrected": BlockMean("row", 1e-8, corrected=True, momentum=0.9),
    "both sides": TwoSided(),
    "both sides up to 5": TwoSided(5),
    "low rank, psi": LowRankFactor(2, 1e-2, "psi"),
    "low rank, bug": LowRankFactor(2, 1e-2, "bug"),
    "low rank, eig": LowRankFactor(2, 1e-2, "eig"),
    "low rank, exact": LowRankFactor(None, 1e-2, "psi"),
    "low rank, symmetric": LowRankSymmetric(2, 1e-2, "eig"),
    "low rank, symmetric, bug": LowRankSymmetric(2, 1e-2, "bug", compensate=False),
    "low rank, symmetric, exact": LowRankSymmetric(None, 1e-2, "eig"),
    "blocks along columns": BlockDiagonal(2, 1e-12, 0.9),
    "blocks along columns, clipped": BlockDiagonal(3, 1e-4, 0.9, "diagonal", 0.5, 1.0),
    "differences": MomentumChange(0.9, 1e-5),
    "left, limited": OneSided("left", limit=0.5),
    "right, cross, limited": OneSided("right", cross_normalize=True, limit=0.5),
    "auto, mean, limited": OneSided("auto", mean=True, limit=0.2),
    "both sides, limited": TwoSided(limit=0.2),
    "blocks along columns, limited": BlockDiagonal(2, 1e-12, 0.9, limit=0.5),
    "left, cross, limited, packed": Packed(OneSided("left", cross_normalize=True, limit=0.5)),
    "square root, left": SquareRoot("left"),
    "square root, right, cross": SquareRoot("right", cross_normalize=True),
    "square root, auto": SquareRoot("auto"),
    "left, packed": Packed(OneSided("left")),
    "right, cross, packed": Packed(OneSided("right", cross_normalize=True)),
    "auto, packed": Packed(OneSided("auto")),
    "left, mean, packed": Packed(OneSided("left", mean=True)),
    "both sides, packed": Packed(TwoSided()),
    "both sides up to 5, packed": Packed(TwoSided(5)),
    "blocks along columns, packed": Packed(BlockDiagonal(2, 1e-12, 0.9)),
    "blocks along columns, clipped, packed": Packed(BlockDiagonal(3, 1e-4, 0.9, "diagonal", 0.5, 1.0)),
}
MIRROR = {"left": "right", "right": "left", "row": "column", "column": "row"}
ALGEBRAS = {
    name: s
    for name, s in STRUCTURES.items()
    if isinstance(s, Algebra)
    and "cross" not in name
    and not name.endswith(("clipped", "limited"))  # those do more than the algebra
}
TWO_SIDED = {name: s for name, s in STRUCTURES.items() if "along columns" not in name}


def over(table):
    return pytest.mark.parametrize("structure", table.values(), ids=table.keys())


every_structure, every_one_sided, every_algebra = over(STRUCTURES), over(ONE_SIDED), over(ALGEBRAS)
every_two_sided = over(TWO_SIDED)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
EPS = 1e-6


def remake(structure, change):
    """The structure, or the one inside it, with fields changed."""
    if isinstance(structure, Packed):
        return Packed(remake(structure.inner, change))
    return replace(structure, **change(structure))


def with_root(structure, root, eps):
    """The structure, or the one inside it, with another root and damping where it has them as settings."""
    if isinstance(structure, Packed):
        return Packed(with_root(structure.inner, root, eps))
    known = {field.name for field in fields(structure)}
    changed = {"root": root, "eps": eps} if "root" in known else {"eps": eps} if isinstance(structure, TwoSided) else {}
    return replace(structure, **changed)


def stacks(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(structure, grads, direction, beta2=0.7, root="eigh"):
    state = structure.init(direction)
    for grad in grads:
        statistic = structure.compute_statistic(grad)
        if isinstance(structure, SquareRoot):  # a singular V has rounding for a root
            statistic = statistic + torch.eye(statistic.shape[-1], dtype=statistic.dtype)
        structure.update_statistic(state, statistic, beta2)
        assert with_root(structure, root, EPS).compute_root(state).all()
        result = structure.precondition(state, direction)
    return result, state


def close(a, b):
    if not b.numel():
        return a.shape == b.shape
    return torch.allclose(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))


@every_structure
@given(shape=sizes, beta2=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_batch_law(structure, shape, beta2):
    grads, direction = stacks(shape, 3), stacks(shape, 1, seed=1)[0]
    result, state = run(structure, grads, direction, beta2)
    assert all(tensor.shape[0] == shape[0] for tensor in state.values())
    for i in range(shape[0]):
        alone, own = run(structure, [g[i : i + 1] for g in grads], direction[i : i + 1], beta2)
        assert close(result[i : i + 1], alone)
        assert all(close(state[key][i : i + 1], own[key]) for key in state)


@every_one_sided
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3), (1, 4, 4)], ids=str)
def test_rotation_law(structure, shape):
    """Rotating the preconditioned side of every gradient rotates the result: the root knows no coordinates."""
    grads, direction = stacks(shape, 4), stacks(shape, 1, seed=1)[0]
    left = structure.left(*shape[1:])
    rotation = torch.linalg.qr(stacks((shape[1] if left else shape[2],) * 2, 1, seed=2)[0])[0]
    turn = (lambda x: rotation @ x) if left else (lambda x: x @ rotation)
    assert close(
        run(structure, [turn(g) for g in grads], turn(direction))[0],
        turn(run(structure, grads, direction)[0]),
    )


@every_two_sided
def test_transpose_law(structure):
    def change(inner):
        field = {OneSided: "side", SquareRoot: "side", BlockMean: "blocks"}.get(type(inner))
        return {} if field is None else {field: MIRROR.get(getattr(inner, field), getattr(inner, field))}

    mirror = remake(structure, change)
    for shape in [(2, 3, 5), (2, 5, 3)]:
        grads, direction = stacks(shape, 4), stacks(shape, 1, seed=1)[0]
        assert close(run(mirror, [g.mT for g in grads], direction.mT)[0], run(structure, grads, direction)[0].mT)


CUT_SHAPES = [(2, 6, 4), (2, 4, 6), (1, 5, 5)]


@every_structure
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_shards_law(structure, axis):
    """Shards give what the whole gives just where a structure says so."""
    for shape in CUT_SHAPES:
        shards = adds_up(structure, axis, shape) and preconditions_shards(structure, axis, shape)
        assert structure.is_shard_additive(axis, *shape[1:]) == shards


DIMS = {"rows": 1, "columns": 2}


def adds_up(structure, axis, shape):
    grad = stacks(shape, 1)[0]
    whole, fixed = structure.compute_statistic(grad), structure.with_side_of(*shape[1:])
    parts = [fixed.compute_statistic(shard) for shard in grad.split(2, DIMS[axis])]
    return all(part.shape == whole.shape for part in parts) and close(sum(parts), whole)


def preconditions_shards(structure, axis, shape):
    """From the whole state, of which only `sharded_keys` is cut, also where one shard of a direction is zero."""
    _, state = run(structure, stacks(shape, 3), stacks(shape, 1, seed=1)[0])
    direction, dim, fixed = stacks(shape, 1, seed=2)[0], DIMS[axis], structure.with_side_of(*shape[1:])
    direction.narrow(dim, 0, 2).zero_()
    pieces, norms = direction.split(2, dim), []
    places = range(len(pieces))
    cut = {key: state[key].split(2, dim) for key in structure.sharded_keys}
    states = [{key: (cut[key][i] if key in cut else x).clone() for key, x in state.items()} for i in places]
    for piece, own in zip(pieces, states, strict=True):  # to learn all norms, on copies
        copy = {key: x.clone() for key, x in own.items()}
        fixed.precondition_shard(copy, piece, lambda of: norms.append(of.clone()) or of)
    joined = torch.stack(norms).square().sum(0).sqrt() if norms else None
    found = [fixed.precondition_shard(states[i], pieces[i], lambda of: joined) for i in places]
    want = structure.precondition(state, direction)
    kept = all(close(torch.cat([own[key] for own in states], dim), state[key]) for key in structure.sharded_keys)
    return kept and close(torch.cat(found, dim), want)


@pytest.mark.usefixtures("repeatable_lapack")
@every_structure
def test_a_fixed_structure_is_the_same_and_knows_its_side(structure):
    for shape in CUT_SHAPES:
        fixed = structure.with_side_of(*shape[1:])
        grads, direction = stacks(shape, 3), stacks(shape, 1, seed=1)[0]
        assert torch.equal(run(fixed, grads, direction)[0], run(structure, grads, direction)[0])
        like = torch.zeros(1, 1, shape[2])  # one row of it
        if structure.is_shard_additive("rows", *shape[1:]):
            first = next(iter(fixed.init(like)))
            assert fixed.init(like)[first].shape[1:] == structure.init(direction)[first].shape[1:]


@every_structure
@pytest.mark.parametrize("beta2", [0.5, 1.0])
def test_idle_law(structure, beta2):
    shape = (3, 4, 6)
    grads, direction = stacks(shape, 3), stacks(shape, 1, seed=1)[0]
    _, state = run(structure, grads, direction, beta2)
    before = {key: tensor.clone() for key, tensor in state.items()}
    idle, rest = stacks(shape, 1, seed=5)[0], direction.clone()
    idle[1], rest[1] = 0, 0
    structure.update_statistic(state, structure.compute_statistic(idle), beta2)
    with_root(structure, "eigh", EPS).compute_root(state)
    result = structure.precondition(state, rest)
    assert not result[1].any()
    for key in state:
        same = torch.allclose if "root" in key else torch.equal
        assert same(state[key][1], before[key][1]), key
    statistic = next(iter(state))
    assert not torch.equal(state[statistic][0], before[statistic][0])


@every_structure
def test_zero_history_gives_zero_and_no_nan(structure):
    zero = torch.zeros(2, 3, 5)
    result, state = run(structure, [zero, zero], zero)
    assert not result.any()
    assert all(tensor.isfinite().all() for tensor in state.values())


UNIT = torch.finfo(torch.float32).eps / 2
CLOSE = {"eigh": UNIT / EPS, "minimax": 4 * (TOLERANCE[torch.float32] + UNIT * EPS**-0.5)}
"""Of a step in float32: twice what a rounding of the statistic does to the root, and twice again what minimax errs."""


@over({name: s for name, s in STRUCTURES.items() if not isinstance(s, SquareRoot)})  # its damping goes with precision
@pytest.mark.parametrize(("root", "tolerance"), CLOSE.items(), ids=CLOSE.keys())
def test_float32_is_close_to_float64(structure, root, tolerance):
    grads = stacks((2, 8, 24), 10)
    direction = grads[-1] + grads[-2]
    exact, _ = run(structure, grads, direction)
    got, _ = run(structure, [g.float() for g in grads], direction.float(), root=root)
    assert (got - exact).norm() <= tolerance * exact.norm()


# ---- the projection of an algebra -------------------------------------------------------------------------------

SIDES = [(3, 4), (4, 3), (3, 3), (1, 5), (5, 1)]


def inner(a, b):
    return float((a * b).sum())


def spd(d, seed):
    factor = stacks((d, d), 1, seed)[0]
    return factor @ factor.mT


def sqrt(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


@every_algebra
def test_project_is_the_orthogonal_projection_on_an_algebra(structure):
    for m, n in SIDES:
        check_project_is_the_orthogonal_projection_on_an_algebra(structure, m, n)


def check_project_is_the_orthogonal_projection_on_an_algebra(structure, m, n):
    def on(matrix):
        return structure.project(matrix, m, n)

    a, b, eye = spd(m * n, 0), spd(m * n, 1), torch.eye(m * n, dtype=torch.float64)
    assert close(on(on(a)), on(a))
    assert inner(on(a), b) == pytest.approx(inner(a, on(b)))  # idempotent and self-adjoint: orthogonal
    assert close(on(2 * a - 3 * b), 2 * on(a) - 3 * on(b))
    assert close(on(eye), eye)
    x, y = on(a), on(b)
    assert close(on(x @ y), x @ y)  # closed under products, so under polynomials and inverse roots
    assert close(on(x.mT), x.mT)
    assert torch.linalg.eigvalsh(x).min() > 0  # keeps positive matrices positive


@every_algebra
def test_the_root_of_the_projection_is_the_best_preconditioner(structure):
    """It minimises <A, H^-1> + tr H over the positive H of the algebra."""
    for m, n in SIDES:
        check_the_root_of_the_projection_is_the_best_preconditioner(structure, m, n)


def check_the_root_of_the_projection_is_the_best_preconditioner(structure, m, n):
    a = spd(m * n, 0)

    def price(h):
        return inner(a, torch.linalg.inv(h)) + float(torch.trace(h))

    best = sqrt(structure.project(a, m, n))
    assert price(best) == pytest.approx(2 * float(torch.trace(best)))
    for seed in range(1, 8):
        other = sqrt(structure.project(spd(m * n, seed), m, n))
        for share in (1.0, 0.1, 0.01):
            assert price(best) <= price((1 - share) * best + share * other) * (1 + 1e-12)


@every_algebra
def test_a_structure_applies_the_inverse_root_of_its_projection(structure):
    for m, n in SIDES:
        grads, direction = stacks((1, m, n), 6), stacks((1, m, n), 1, seed=9)[0]
        total = sum(torch.outer(g.reshape(-1), g.reshape(-1)) for g in grads)
        projected = structure.project(total, m, n)
        want = torch.linalg.solve(sqrt(projected), direction.reshape(-1))
        got = run(structure, grads, direction, beta2=1.0, root="outside")[0].reshape(-1)
        assert (got / got.norm() - want / want.norm()).norm() < 1e-5


def test_a_structure_states_the_keys_of_its_state():
    given = {}
    for structure in STRUCTURES.values():
        inner = structure.inner if isinstance(structure, Packed) else structure
        keys = inner.init(torch.zeros(1, 3, 4)).keys()
        assert structure.added.keys() <= keys
        given.setdefault(type(inner), set()).update(keys)
    assert given == {kind: set(kind.state_keys) for kind in given}


@pytest.mark.parametrize("side", ["left", "right", "auto"])
def test_memory_is_that_of_the_preconditioned_side(side):
    for m, n in [(3, 7), (7, 3), (5, 5)]:
        k = {"left": m, "right": n, "auto": min(m, n)}[side]
        state = OneSided(side).init(torch.zeros(2, m, n))
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
            "gram": (2, k, k),
            "root": (2, k, k),
        }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_norms_along_an_axis_are_norms_in_any_memory_order(axis, turned):
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    x[1] = 0.0
    x = x.mT.contiguous().mT if turned else x
    torch.testing.assert_close(norms_along(x, axis), torch.linalg.vector_norm(x, dim=axis, keepdim=True))


# ---- names of version 0.1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [("Kronecker", TwoSided), ("Blockwise", BlockMean), ("DenseBlocks", BlockDiagonal), ("Difference", MomentumChange)],
)
def test_old_names_of_structures_work_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"asgo.structures.{old} is called {new.__name__} now"):
        assert getattr(asgo.structures, old) is new


def test_a_structure_with_the_old_names_of_methods_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Old.measure is called compute_statistic now"):

        class Old(BlockMean):
            def measure(self, grad):
                return grad.square()

            def refresh(self, state, root, eps):
                return root(torch.eye(2)[None].repeat(len(state["exp_avg_sq"]), 1, 1), eps)[1]

    structure, like = Old("entry", 1e-8), torch.ones(3, 2, 2)
    assert torch.equal(structure.compute_statistic(2 * like), 4 * like)
    assert structure.compute_root(structure.init(like)).tolist() == [True] * 3
