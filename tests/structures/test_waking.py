"""What a root or an average that knows too little may do: a spike, a row, a column or a matrix that wakes late."""

import math

import pytest
import torch

from asgo import ASGO, AdaBlock, OneSidedShampoo, Shampoo
from asgo.structures import BlockDiagonal, OneSided, Packed, opened
from asgo.structures.base import reach

DECAY = 0.95
"""Of the running second moment along the other side."""


def draw(shape, step, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=dtype)


# ---- roots that are older than the statistic ------------------------------------------------------------------------


def wild(shape, step):
    """Gradients with everything at once: rows, columns and entries that sleep until late, spikes, a change of scale."""
    grad = draw(shape, step) * (1 if step < 30 else 1e-3)
    if step < 17:
        grad[1] = 0
    if step < 23:
        grad[:, 2] = 0
    if step == 27:
        grad += 1e4 * draw((shape[0], 1), 500) @ draw((1, shape[1]), 501)
    return grad


def steps_of(make, shape, count=45):
    """The updates of a matrix over lr, rescaled by nothing."""
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = make([param])
    for step in range(count):
        param.grad = wild(shape, step)
        before = param.detach().clone()
        optimizer.step()
        yield (param.detach() - before) / optimizer.param_groups[0]["lr"]


def longest(update, axes):
    return max(float(torch.linalg.vector_norm(update, dim=axis).max()) for axis in axes)


PLAIN = {"weight_decay": 0.0, "cross_normalize": False, "adjust_lr": None}
RATIO = [1, *((1 - 0.9**t) / math.sqrt(1 - 0.8**t) for t in range(1, 500))]
ROWS, COLUMNS = 1, 0
LIMITED = {
    "rows": (lambda p, every: ASGO(p, precondition_frequency=every, **PLAIN), (6, 11), [ROWS], 0.8**-0.5),
    "columns": (lambda p, every: ASGO(p, precondition_frequency=every, **PLAIN), (11, 6), [COLUMNS], 0.8**-0.5),
    "packed": (
        lambda p, every: ASGO(p, precondition_frequency=every, packed_state=True, **PLAIN),
        (6, 11), [ROWS], 0.8**-0.5,
    ),
    "of the gradient": (
        lambda p, every: ASGO(
            p, betas=(0.9, 0.8), precondition_frequency=every, statistic="gradient", nesterov=False, **PLAIN
        ),
        (6, 11), [ROWS], max(RATIO),
    ),
    "a sum": (lambda p, every: OneSidedShampoo(p, 1e-2, precondition_frequency=every), (6, 11), [ROWS], 11**0.5),
    "both sides": (lambda p, every: Shampoo(p, precondition_frequency=every), (6, 11), [ROWS, COLUMNS], 1.0),
    "one of both sides": (
        lambda p, every: Shampoo(p, precondition_frequency=every, max_size=8), (6, 11), [ROWS, COLUMNS], 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("every", [2, 7])
@pytest.mark.parametrize(("make", "shape", "axes", "limit"), LIMITED.values(), ids=LIMITED.keys())
def test_no_row_is_longer_than_a_fresh_root_makes_it(make, shape, axes, limit, every):
    """``V >= (1 - b2) S S^T`` bounds what a fresh root gives; an old one keeps to it too, and nothing rests for it."""
    updates = list(steps_of(lambda p: make(p, every), shape))
    assert max(longest(update, axes) for update in updates) <= limit * (1 + 1e-9)
    assert all(update.any() for update in updates)


def test_no_run_of_adablock_is_longer_than_a_constant_gradient_makes_it():
    def make(params):
        return AdaBlock(params, block_size=3, precondition_frequency=7)

    ratio = [(1 - 0.9**t) / math.sqrt(1 - 0.999**t) for t in range(1, 500)]
    for update in steps_of(make, (6, 11)):
        assert longest(update.T.reshape(11, 2, 3), [2]) <= max(ratio) * (1 + 1e-9)


@pytest.mark.parametrize("beta2", [0.0, 0.2, 0.95, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_limit_of_a_momentums_own_statistic_touches_no_fresh_row(side, beta2):
    limited = OneSided(side, limit=reach(0.95, beta2, "momentum"), root="eigh")
    found = []
    for structure in (limited, OneSided(side, root="eigh")):
        state, momentum = structure.init(torch.zeros(1, 5, 5, dtype=torch.float64)), torch.zeros(1, 5, 5).double()
        for step in range(40):
            momentum = momentum.lerp(wild((5, 5), step)[None], 0.05)
            structure.update_statistic(state, structure.compute_statistic(momentum), beta2)
            structure.compute_root(state)
            found.append(structure.precondition(state, momentum))
    for one, other in zip(found[:40], found[40:], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", [ASGO, ASGO.paper, ASGO.reference, lambda p: ASGO.theory(p, 1e-2)])
def test_where_every_root_is_fresh_there_is_no_limit(make):
    optimizer = make([torch.nn.Parameter(torch.zeros(3, 4))])
    group = optimizer.param_groups[0]
    assert optimizer.structure(group).limit is None


@pytest.mark.parametrize("every", [2, 7])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6)], ids=str)
def test_the_size_along_the_other_side_forgets_a_spike_as_it_forgets_all(shape, packed, every):
    """Rows are at most 1.118 long, so the average over six rows of the squares of 11 columns is at most 1.25 in all."""
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = ASGO([param], precondition_frequency=every, packed_state=packed)
    for step in range(45):
        param.grad = wild(shape, step)
        optimizer.step()
        state = optimizer.state[param]
        assert state["cross"].sum() <= (1 - DECAY ** (step + 1)) / 0.8 * (1 + 1e-9)


def updates_with(spike, every, cross):
    param = torch.nn.Parameter(torch.zeros(16, 32))
    optimizer = ASGO([param], weight_decay=0.0, precondition_frequency=every, cross_normalize=cross)
    signal, found = 0.3 * draw((16, 32), 999, torch.float32), []
    for step in range(120):
        param.grad = signal + draw((16, 32), step, torch.float32)
        if step == 40:
            param.grad += spike * draw((16, 1), 1001, torch.float32) @ draw((1, 32), 1002, torch.float32)
        before = param.detach().clone()
        optimizer.step()
        found.append((param.detach() - before).flatten())
    return found


@pytest.mark.parametrize("cross", [True, False])
def test_a_spike_is_over_as_soon_as_with_a_root_at_every_step(cross):
    """From one interval on; 0.1 is for what a few steps in the spike's direction leave behind."""
    cosines = {
        every: [
            float(torch.cosine_similarity(a, b, 0))
            for a, b in zip(updates_with(0, every, cross), updates_with(1e3, every, cross), strict=True)
        ]
        for every in (1, 2, 10)
    }
    for after in (10, 20, 40, 70):
        for every in (2, 10):
            assert cosines[every][40 + after] >= cosines[1][40 + after] - 0.1


def test_a_row_that_wakes_takes_no_more_than_the_others():
    """Its length is limited to 1.118; that of the others, of noise, is near 1."""
    param = torch.nn.Parameter(torch.zeros(32, 64))
    optimizer = ASGO([param], weight_decay=0.0, lr=1.0, precondition_frequency=10)
    for step in range(80):
        param.grad = draw((32, 64), step, torch.float32)
        if step < 63:
            param.grad[0] = 0
        before = param.detach().clone()
        optimizer.step()
        update = (param.detach() - before).square().mean(1).sqrt()
        if step >= 63:
            assert update[0] <= 1.5 * update[1:].mean()
            assert update[1:].mean() > 0.15  # of 0.2


# ---- averages that have begun late -----------------------------------------------------------------------------------


def every_side(test):
    return pytest.mark.parametrize("side", ["left", "right"])(test)


def evolve(structure, directions):
    """The last result and the state, with a fresh root at every step."""
    state = structure.init(directions[0])
    for direction in directions:
        structure.update_statistic(state, structure.compute_statistic(direction), 0.2)
        structure.compute_root(state)
        result = structure.precondition(state, direction)
    return result, opened(structure, state)[1]


@every_side
@pytest.mark.parametrize("wrap", [lambda s: s, Packed])
def test_a_matrix_starts_with_columns_of_unit_size_whenever_it_wakes(side, wrap):
    structure = wrap(OneSided(side, cross_normalize=True))
    directions = [draw((3, 4, 6), step) for step in range(30)]
    for direction in directions[:-1]:
        direction[1] = 0
    result, _ = evolve(structure, directions)
    size = result[1].square().mean(0 if side == "left" else 1).sqrt()
    assert torch.allclose(size, torch.ones_like(size), rtol=1e-9)


@every_side
def test_an_index_of_the_other_side_starts_with_unit_size_whenever_it_wakes(side):
    structure = OneSided(side, cross_normalize=True)
    directions = [draw((1, 4, 6), step) for step in range(30)]
    for direction in directions[:-1]:
        direction.select(2 if side == "left" else 1, 2).zero_()
    result, _ = evolve(structure, directions)
    size = result.select(2 if side == "left" else 1, 2).square().mean().sqrt()
    assert float(size) == pytest.approx(1, rel=1e-9)


@every_side
def test_the_weight_is_that_of_the_steps_in_which_an_average_has_grown(side):
    structure = OneSided(side, cross_normalize=True)
    directions = [draw((3, 4, 6), step) for step in range(12)]
    for step, direction in enumerate(directions):
        if step % 3:
            direction[1] = 0
    _, state = evolve(structure, directions)
    for matrix, steps in enumerate((12, 4, 12)):
        assert torch.allclose(state["cross_weight"][matrix], torch.tensor(1 - DECAY**steps).double(), rtol=1e-9)


@every_side
def test_a_state_without_weights_goes_on_as_before(side):
    """Earlier versions divided by the average as it was: what they imply is a weight of 1."""
    structure = OneSided(side, cross_normalize=True)
    assert structure.added == Packed(structure).added == {"cross_weight": 1.0}
    assert OneSided(side).added == BlockDiagonal(2, 1e-4, 0.9).added == {}
    directions = [draw((2, 4, 6), step) for step in range(5)]
    _, state = evolve(structure, directions)
    state["cross_weight"].fill_(structure.added["cross_weight"])
    new, plain, cross = draw((2, 4, 6), 99), OneSided(side), state["cross"].clone()
    root = plain.precondition({"root": state["root"]}, new)
    cross = DECAY * cross + (1 - DECAY) * root.square().mean(1 if side == "left" else 2, keepdim=True)
    assert torch.allclose(structure.precondition(state, new), root / cross.sqrt(), rtol=1e-9)
    assert (state["cross_weight"] == 1).all()


@pytest.mark.parametrize("experts", [4, 16])
def test_an_expert_that_wakes_late_steps_like_the_others_and_does_not_slow_them(experts):
    """By itself it has a size of exactly 1; that of the others is an average's, which noise keeps near 1."""
    param = torch.nn.Parameter(torch.zeros(experts, 8, 16))
    optimizer = ASGO([{"params": [param], "view": "e m n -> e m n"}], lr=1.0, weight_decay=0.0)
    for step in range(120):
        param.grad = draw((experts, 8, 16), step, torch.float32)
        if step < 60 or step % 10:
            param.grad[0] = 0
        before = param.detach().clone()
        optimizer.step()
        size = (param.detach() - before).square().mean((1, 2)).sqrt()
        if step >= 60 and step % 10 == 0:
            assert 0.5 < size[0] / size[1:].mean() < 1.5
            assert 0.17 < size[1:].mean() < 0.23
