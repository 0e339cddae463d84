"""Laws that every structure obeys. A new structure is one more row of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asgo.roots import ROOTS
from asgo.structures import OneSided

STRUCTURES = {
    "left": OneSided("left"),
    "right": OneSided("right"),
    "auto": OneSided("auto"),
    "left, cross": OneSided("left", cross_normalize=True),
    "right, cross": OneSided("right", cross_normalize=True),
    "auto, cross": OneSided("auto", cross_normalize=True),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
sizes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
EPS = 1e-6


def stacks(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(structure, grads, direction, beta2=0.7, root="eigh"):
    state = structure.init(direction)
    for grad in grads:
        structure.fold(state, structure.measure(grad), beta2)
        assert structure.refresh(state, ROOTS[root], EPS).all()
        result = structure.precondition(state, direction)
    return result, state


def close(a, b):
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


@every_structure
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


@every_structure
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3)], ids=str)
def test_transpose_law(structure, shape):
    mirrored = {"left": "right", "right": "left", "auto": "auto"}[structure.side]
    mirror = OneSided(mirrored, structure.cross_normalize)
    grads, direction = stacks(shape, 4), stacks(shape, 1, seed=1)[0]
    assert close(run(mirror, [g.mT for g in grads], direction.mT)[0], run(structure, grads, direction)[0].mT)


@every_structure
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6), (1, 5, 5)], ids=str)
def test_shards_law(structure, shape):
    grad = stacks(shape, 1)[0]
    whole, left = structure.measure(grad), structure.left(*shape[1:])
    assert structure.additive_rows(*shape[1:]) == (not left)
    if structure.additive_rows(*shape[1:]):
        # A shard may be taller or wider than the whole, so its side is given.
        measure = OneSided("right").measure
        assert close(sum(measure(shard) for shard in grad.split(2, dim=1)), whole)
    else:
        assert whole.shape[1] == shape[1]  # rows of different shards meet in the gram: they cannot be summed


@every_structure
@pytest.mark.parametrize("beta2", [0.5, 1.0])
def test_idle_law(structure, beta2):
    shape = (3, 4, 6)
    grads, direction = stacks(shape, 3), stacks(shape, 1, seed=1)[0]
    _, state = run(structure, grads, direction, beta2)
    before = {key: tensor.clone() for key, tensor in state.items()}
    idle, rest = stacks(shape, 1, seed=5)[0], direction.clone()
    idle[1], rest[1] = 0, 0
    structure.fold(state, structure.measure(idle), beta2)
    structure.refresh(state, ROOTS["eigh"], EPS)
    result = structure.precondition(state, rest)
    assert not result[1].any()
    assert all(torch.equal(state[key][1], before[key][1]) for key in state if key != "root")
    assert torch.allclose(state["root"][1], before["root"][1])
    assert not torch.equal(state["gram"][0], before["gram"][0])


@every_structure
def test_zero_history_gives_zero_and_no_nan(structure):
    zero = torch.zeros(2, 3, 5)
    result, state = run(structure, [zero, zero], zero)
    assert not result.any()
    assert all(tensor.isfinite().all() for tensor in state.values())


@every_structure
@pytest.mark.parametrize(("root", "tolerance"), [("eigh", 4e-2), ("minimax", 8e-3)])
def test_float32_is_close_to_float64(structure, root, tolerance):
    grads = stacks((2, 12, 40), 10)
    direction = grads[-1] + grads[-2]
    exact, _ = run(structure, grads, direction)
    got, _ = run(structure, [g.float() for g in grads], direction.float(), root=root)
    assert (got - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("side", ["left", "right", "auto"])
def test_memory_is_that_of_the_preconditioned_side(side):
    for m, n in [(3, 7), (7, 3), (5, 5)]:
        k = {"left": m, "right": n, "auto": min(m, n)}[side]
        state = OneSided(side).init(torch.zeros(2, m, n))
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
            "gram": (2, k, k),
            "root": (2, k, k),
        }
