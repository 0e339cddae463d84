"""The schedule of the minimax root, against printed tables and the theory of best approximation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asgo.linalg.inverse_root import minimax
from asgo.linalg.polynomial import MAX_STEPS, TAYLOR, best_odd, compose, schedule, smallest_sigma

# Printed on the numerics page, from another program; eps 1e-7 stands there with l = 9e-8.
TABLES = {
    9e-5: [
        (8.03740071, -23.0191759, 16.6722244),
        (3.63743458, -2.67000699, 0.514274679),
        (2.69938011, -1.97561303, 0.438927838),
        (1.96440261, -1.33324734, 0.373823628),
    ],
    9e-6: [
        (8.30192905, -24.0424295, 17.469943),
        (4.00780252, -2.92661787, 0.542507017),
        (3.48962635, -2.56541389, 0.502803797),
        (2.49735482, -1.81258113, 0.421703915),
        (1.91372694, -1.28143114, 0.369221707),
    ],
    9e-7: [
        (8.38909531, -24.379836, 17.7330603),
        (4.14663244, -3.02106998, 0.552920611),
        (3.94457093, -2.88330465, 0.5377346),
        (3.31695923, -2.44136048, 0.489237793),
        (2.31532572, -1.65879423, 0.405766462),
        (1.88559411, -1.25201635, 0.366817387),
    ],
    9e-8: [
        (8.41702539, -24.4879721, 17.8173952),
        (4.19308249, -3.05248483, 0.556386139),
        (4.12450257, -3.00607168, 0.551266576),
        (3.86414733, -2.82793489, 0.531637633),
        (3.1230648, -2.29928234, 0.47376743),
        (2.16356122, -1.52383113, 0.392133523),
        (1.87243975, -1.23820226, 0.365857043),
    ],
}


@pytest.mark.parametrize("low", TABLES)
def test_coefficients_are_the_printed_ones(low: float):
    steps = compose(math.sqrt(low), 1e-12)[: len(TABLES[low])]
    for step, printed in zip(steps, TABLES[low], strict=True):
        assert step == pytest.approx(printed, rel=1e-5)  # the printed digits agree to 1e-7 at first, 1e-5 at last


@pytest.mark.parametrize(("eps", "count"), [(1e-4, 5), (1e-5, 6), (1e-6, 6), (1e-7, 7), (1e-8, 8)])
def test_number_of_steps(eps: float, count: int):
    assert len(schedule(eps)) == count
    assert schedule(eps) is schedule(eps)
    low = {1e-7: 5e-8, 1e-8: 5e-9}.get(eps, 0.9 * eps)
    assert smallest_sigma(eps) ** 2 == pytest.approx(low)


def apply(quintic: tuple[float, float, float], x: Tensor) -> Tensor:
    return quintic[0] * x + quintic[1] * x**3 + quintic[2] * x**5


@settings(max_examples=25, deadline=None)
@given(low=st.floats(1e-5, 0.95), width=st.floats(0.01, 1))
def test_best_quintic_equioscillates(low: float, width: float):
    """Four equal extrema of alternating sign: by Chebyshev's theorem no odd quintic is nearer to 1."""
    quintic, distance = best_odd(low, low + width)
    off = 1 - apply(quintic, torch.linspace(low, low + width, 100_001, dtype=torch.float64))
    assert off.abs().max() == pytest.approx(distance, rel=1e-3, abs=1e-12)
    runs = torch.unique_consecutive(torch.sign(off[off.abs() > 0.999 * distance]))
    assert runs.tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("eps", [1.0, 0.1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("tolerance", [2e-3, 1e-9])
def test_schedule_reaches_its_tolerance_with_room_above(eps: float, tolerance: float):
    x = torch.linspace(smallest_sigma(eps), 1, 100_001, dtype=torch.float64)
    above = torch.linspace(1, 1.004, 1001, dtype=torch.float64)
    for step in schedule(eps, tolerance):
        x, above = apply(step, x), apply(step, above)
    assert (x - 1).abs().max() <= tolerance * 1.001
    assert (above - 1).abs().max() <= max(tolerance, 3e-3)


def test_tiny_damping_is_capped_and_benign():
    steps = schedule(1e-30)
    assert len(steps) == MAX_STEPS
    sigma = torch.logspace(-15, 0, 1001, dtype=torch.float64)
    gain = torch.ones_like(sigma)
    for step in steps:
        gain = gain * apply(step, sigma * gain) / (sigma * gain)
    assert (sigma * gain).max() <= 2
    assert gain.isfinite().all()


def test_narrow_intervals_end_with_the_taylor_step():
    assert schedule(1e-6, 1e-9)[-1] == TAYLOR
    assert len(schedule(1e-6, 1e-9)) == 8


@pytest.mark.parametrize("eps", [0.0, -1e-6, math.inf, math.nan])
def test_minimax_refuses_an_impossible_damping(eps: float):
    with pytest.raises(ValueError, match=r"root 'minimax' got eps=.*: it needs a positive damping\. Pass eps=1e-6"):
        minimax(torch.eye(2)[None], eps)
