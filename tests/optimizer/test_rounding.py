"""An update is added in float32 and rounded once: to nearest, at random, or with what is lost kept."""

import math
from itertools import product

import pytest
import torch

from asgo.optimizer.rounding import add_rounded_, init_residual, seed_of, uniform, widened, write_rounded_

BITS = {torch.bfloat16: 8, torch.float16: 11}
LEAST = {torch.bfloat16: -126, torch.float16: -14}  # exponents of the smallest normal numbers
MODES = ["nearest", "stochastic", "compensated"]

every_mode = pytest.mark.parametrize("mode", MODES)
every_narrow = pytest.mark.parametrize("dtype", BITS, ids=str)


def spacing(value, dtype):
    """The distance between the numbers of a type around a float64, by its exponent."""
    exponent = torch.frexp(value.abs())[1] - 1
    return torch.ldexp(torch.ones_like(value), exponent.clamp_min(LEAST[dtype]) - (BITS[dtype] - 1))


def draw(shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def extras(targets, mode, step=0):
    residuals = [init_residual(target) for target in targets] if mode == "compensated" else None
    return residuals, [seed_of(step, i) for i in range(len(targets))] if mode == "stochastic" else None


def targets_of(dtype):
    """A parameter, a part of one, one in another memory order, a scalar, an empty one."""
    whole = draw((6, 8), 1).to(dtype)
    return [draw((5, 3), 0).to(dtype), whole[:, 2:5], draw((4, 7), 2).to(dtype).T, draw((), 3).to(dtype), whole[:0]]


# ---- each mode by its definition ------------------------------------------------------------------------------------


@every_narrow
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("decay", [1.0, 0.999, torch.tensor(0.999)])
@pytest.mark.parametrize("mode", ["nearest", "compensated"])
def test_the_sum_is_rounded_once_to_the_nearest(dtype, scale, decay, mode):
    targets = targets_of(dtype)
    before = [target.double() for target in targets]
    updates = [draw(target.shape, 10 + i, scale) for i, target in enumerate(targets)]
    add_rounded_(targets, decay, updates, mode, *extras(targets, mode))
    for old, update, new in zip(before, updates, targets, strict=True):
        exact = old * float(decay) + update.double()
        in_float32 = 2.0**-22 * (old.abs() + update.abs())  # a factor, a product and a sum, each half a unit of 2^-23
        assert ((new.double() - exact).abs() <= spacing(exact, dtype) / 2 + in_float32).all()


@every_narrow
@every_mode
def test_entries_beside_a_part_stay(dtype, mode):
    whole = draw((6, 8), 1).to(dtype)
    before, part = whole.clone(), whole[:, 2:5]
    add_rounded_([part], 0.9, [draw(part.shape, 2)], mode, *extras([part], mode))
    changed = whole != before
    assert changed[:, 2:5].any()
    assert not changed[:, :2].any()
    assert not changed[:, 5:].any()


VALUES = [1.0 + 2.0**-12, 1.3, -0.7531, 3.2e-5, -6.5e4 + 7, 2.0 - 2.0**-14, 1e-7]


@every_narrow
@pytest.mark.parametrize("value", VALUES)
def test_random_rounding_keeps_the_mean_and_takes_a_neighbour(dtype, value):
    """With steps of size s, up with probability p: n draws have a mean within 5 s sqrt(p (1 - p) / n) of the value."""
    n = 2**16
    values = torch.full((n,), value)
    targets = [torch.zeros(n, dtype=dtype)]
    write_rounded_(targets, [values], "stochastic", seeds=[7])
    exact, got = values[:1].double(), targets[0].double()
    step = float(spacing(exact, dtype))
    p = float(exact) / step - math.floor(float(exact) / step)
    assert ((got - exact).abs() < step).all()
    assert len(got.unique()) == 2
    assert abs(float(got.mean() - exact)) <= 5 * step * math.sqrt(p * (1 - p) / n)


@every_narrow
def test_what_needs_no_rounding_is_not_rounded(dtype):
    values = draw((1000,), 0).to(dtype).float()
    for mode in MODES:
        targets = [torch.zeros(1000, dtype=dtype)]
        write_rounded_(targets, [values], mode, *extras(targets, mode))
        assert torch.equal(targets[0].float(), values)


@every_narrow
@pytest.mark.parametrize("start", [1.0, 0.02, -300.0, 1e-3])
def test_with_residuals_many_small_steps_add_up(dtype, start):
    """Target and residual hold 24 bits: every step loses at most two roundings of float32, half a unit."""
    steps, count = 3000, 64
    target = torch.full((count,), start, dtype=dtype)
    exact, residuals = target.double(), [init_residual(target)]
    update = draw((count,), 5, abs(start) * 1e-5)  # of bfloat16's half spacing at 1, 1/200
    for _ in range(steps):
        add_rounded_([target], 1 - 1e-5, [update], "compensated", residuals)
        exact = exact * (1 - 1e-5) + update.double()
    got = widened([target], [update], residuals)[0].double()
    unit = torch.maximum(2.0**-23 * exact.abs(), spacing(exact, dtype) / 65536)
    assert ((got - exact).abs() <= 2 * steps * unit).all()
    assert ((target.double() - got).abs() <= spacing(got, dtype) / 2 * (1 + 1e-4)).all()


def test_bfloat16_and_its_residual_are_the_float32_number():
    """To the last bit; within half of it at ties, and just below a power of two, where float32 is the finer one."""
    value = draw((100_000,), 3) * torch.exp(draw((100_000,), 4) * 5)
    target = [torch.zeros(100_000, dtype=torch.bfloat16)]
    residuals = [init_residual(target[0])]
    write_rounded_(target, [value], "compensated", residuals)
    back = widened(target, [value], residuals)[0]
    assert torch.equal(target[0], value.bfloat16())
    step = spacing(target[0].double(), torch.bfloat16)
    assert ((back - value).abs() <= step / 65536).all()
    plain = (spacing(value.double(), torch.bfloat16) == step) & ((value - target[0]).abs() < step / 2)
    assert torch.equal(back[plain], value[plain])


@every_narrow
def test_a_float32_run_and_a_compensated_one_are_the_same_numbers(dtype):
    """What the optimizer adds to does not depend on how many bits the parameter has, but for the last one."""
    target = draw((50, 20), 0).to(dtype)
    master, residuals = target.float(), [init_residual(target)]
    for step in range(200):
        update = draw((50, 20), step, 1e-3)
        add_rounded_([target], 0.9999, [update], "compensated", residuals)
        add_rounded_([master], 0.9999, [update])
    got = widened([target], [master], residuals)[0]
    assert ((got - master).abs() <= 200 * 2.0**-23 * master.abs().clamp_min(0.1)).all()


# ---- the numbers of random rounding ---------------------------------------------------------------------------------


def test_the_numbers_are_uniform_and_independent():
    """Means, bins and correlations of n numbers within 5 standard deviations of what chance gives."""
    n = 2**16
    like = torch.empty(n)
    draws = {key: uniform(like, seed_of(*key)).double() for key in product((0, 1, 1000), (0, 1, 17))}
    for drawn in draws.values():
        assert drawn.min() >= 0
        assert drawn.max() < 1
        assert abs(float(drawn.mean()) - 0.5) <= 5 * math.sqrt(1 / 12 / n)
        bins = torch.histc(drawn, 64, 0, 1)
        assert ((bins - n / 64).abs() <= 5 * math.sqrt(n / 64)).all()
    centred = torch.stack([drawn - 0.5 for drawn in draws.values()]) * math.sqrt(12)
    correlations = centred @ centred.T / n
    shifted = (centred[:, 1:] * centred[:, :-1]).mean(1)
    assert (correlations.fill_diagonal_(0).abs() <= 5 / math.sqrt(n)).all()
    assert (shifted.abs() <= 5 / math.sqrt(n)).all()


def test_numbers_depend_on_seed_and_place_alone():
    like = torch.empty(5, 7)
    assert torch.equal(uniform(like, 3), uniform(like.T.contiguous().T, 3))
    assert torch.equal(uniform(like, seed_of(4, 2)), uniform(like, seed_of(torch.tensor(4.0), 2)))
    assert not torch.equal(uniform(like, 3), uniform(like, 4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniform(like, 3)
    assert torch.equal(torch.get_rng_state(), before)


@every_narrow
def test_two_ranks_and_a_resumed_run_round_alike(dtype):
    def run(steps, state=None):
        target = draw((9, 5), 0).to(dtype) if state is None else state.clone()
        for step in steps:
            add_rounded_([target], 0.99, [draw((9, 5), step, 1e-3)], "stochastic", seeds=[seed_of(step, 4)])
        return target

    assert torch.equal(run(range(20)), run(range(20)))
    assert torch.equal(run(range(20)), run(range(8, 20), run(range(8))))


# ---- what holds for all modes ---------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_targets_are_updated_in_place_as_ever(mode, dtype):
    target, update = draw((5, 4), 0).to(dtype), draw((5, 4), 1).to(dtype)
    want, (residuals, seeds) = target.clone().mul_(0.99).add_(update), extras([target], mode)
    add_rounded_([target], 0.99, [update], mode, residuals, seeds)
    assert torch.equal(target, want)
    assert residuals is None or residuals[0].numel() == 0


@every_mode
def test_dtypes_may_be_mixed(mode):
    targets = [draw((4, 3), i).to(dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))]
    alone = [target.clone() for target in targets]
    updates, (residuals, seeds) = [draw((4, 3), 9)] * 3, extras(targets, mode)
    add_rounded_(targets, 0.9, updates, mode, residuals, seeds)
    for i, target in enumerate(alone):
        own = extras([target], mode)[0], [seed_of(0, i)] if mode == "stochastic" else None
        add_rounded_([target], 0.9, updates[:1], mode, *own)
        assert torch.equal(target, targets[i])


@every_mode
@every_narrow
def test_what_is_not_finite_stays_visible_and_leaves_no_trace(mode, dtype):
    target = torch.zeros(4, dtype=dtype)
    residuals, seeds = extras([target], mode)
    write_rounded_([target], [torch.tensor([math.inf, -math.inf, math.nan, 1.0])], mode, residuals, seeds)
    assert target.isinf().tolist() == [True, True, False, False]
    assert target.isnan().tolist() == [False, False, True, False]
    write_rounded_([target], [torch.full((4,), 0.5)], mode, residuals, seeds)
    assert widened([target], [torch.zeros(4)], residuals)[0].tolist() == [0.5] * 4


@every_mode
def test_nothing_is_read_by_the_host(mode):
    targets = [torch.empty(3, 4, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float16)]
    step, updates = torch.empty((), device="meta"), [torch.empty(3, 4, device="meta")] * 2
    residuals = [init_residual(target) for target in targets] if mode == "compensated" else None
    seeds = [seed_of(step, i) for i in range(2)] if mode == "stochastic" else None
    add_rounded_(targets, torch.empty((), device="meta"), updates, mode, residuals, seeds)


@every_mode
def test_it_is_one_graph_that_is_compiled_once(mode):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(target, update, residual, at):
        residuals = [residual] if mode == "compensated" else None
        seeds = [seed_of(at, 3)] if mode == "stochastic" else None
        add_rounded_([target], 0.99, [update], mode, residuals, seeds)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    results = []
    for run in (step, compiled):
        target = draw((4, 3), 0).bfloat16()
        residual = init_residual(target)
        for at in range(3):
            run(target, draw((4, 3), at), residual, torch.tensor(float(at)))
        results.append(target)
    assert torch.equal(*results)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("up", r"^rounding must be one of 'nearest', 'stochastic', 'compensated'; got 'up'\.$"),
        ("stochastic", r"^rounding 'stochastic' needs seeds, .*asgo\.optimizer\.rounding\.seed_of\.$"),
        ("compensated", r"^rounding 'compensated' needs residuals, .*asgo\.optimizer\.rounding\.init_residual\.$"),
    ],
)
def test_errors_come_before_anything_changes(mode, message):
    target = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        add_rounded_([target], 0.5, [torch.ones(3)], mode)
    assert (target == 1).all()
