"""Shares of a curvature block: against numpy on dense matrices, by known structure, and unbiased when probed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.hessian.estimates import (
    Exact,
    Probed,
    jackknife,
    mean,
    partial_traces,
    signs,
    squares_within,
    units,
)
from oracle_hessian import reference

SHAPES = [(3, 4), (4, 3), (6, 2), (1, 5), (5, 1)]


def symmetric(d, seed=0):
    random = np.random.default_rng(seed)
    half = random.standard_normal((d, d)) * np.exp(random.standard_normal(d))
    return half + half.T


def times(H, probes):
    """What the block makes of probes."""
    flat = probes.flatten(1).double() @ torch.from_numpy(H)
    return flat.reshape(probes.shape)


def exact(H, m, n, groups=None, chunk=5):
    block = Exact(m, n, groups)
    for start in range(0, m * n, chunk):
        block.add(start, times(H, units(m, n, start, min(start + chunk, m * n))))
    return {name: share.value for name, share in block.shares().items()}


def probed(H, m, n, groups, sets, seed=0):
    block = Probed(m, n, groups, torch.Generator().manual_seed(seed))
    for _ in range(sets):
        probes = block.draw()
        block.add(probes, times(H, probes))
    return block.shares()


def by_rows(m, n, heads):
    return (torch.arange(m) // (m // heads))[:, None].expand(m, n)


def by_columns(m, n, heads):
    return (torch.arange(n) // (n // heads))[None].expand(m, n)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_exact_shares_are_those_of_the_dense_matrix(m, n):
    H = symmetric(m * n)
    assert exact(H, m, n) == pytest.approx(reference(H, m, n), rel=1e-9)


@given(m=st.integers(1, 4), n=st.integers(1, 4), seed=st.integers(0, 100), scale=st.sampled_from([1e-12, 1.0, 1e9]))
@settings(max_examples=30, deadline=None)
def test_shares_have_no_scale_and_turn_with_the_matrix(m, n, seed, scale):
    H = symmetric(m * n, seed)
    swap = np.arange(m * n).reshape(m, n).T.flatten()
    plain, turned = exact(scale * H, m, n), exact(H[swap][:, swap], n, m)
    assert plain["norm"] == pytest.approx(scale * turned["norm"])
    pairs = {"left": "right", "right": "left", "scalar": "scalar"}
    assert [plain[a] for a in pairs] == pytest.approx([turned[b] for b in pairs.values()], abs=1e-9)
    assert plain["scalar"] <= min(plain["left"], plain["right"]) + 1e-9
    assert max(plain[name] for name in ("rows", "left", "right")) <= 1 + 1e-9


@pytest.mark.parametrize("groups", [by_rows(4, 6, 2), by_columns(4, 6, 3), by_columns(4, 6, 2)])
def test_exact_shares_by_group(groups):
    H = symmetric(24)
    assert exact(H, 4, 6, groups) == pytest.approx(reference(H, 4, 6, groups), rel=1e-9)


def test_known_structures():
    S, T = symmetric(4, 1), symmetric(6, 2)
    groups = by_rows(4, 6, 2)
    left = exact(np.kron(S, np.eye(6)), 4, 6)
    assert left["left"] == pytest.approx(1)
    assert left["right"] == pytest.approx(left["scalar"])
    right = exact(np.kron(np.eye(4), T), 4, 6)
    assert [right["right"], right["rows"]] == pytest.approx([1, 1])
    assert right["left"] == pytest.approx(right["scalar"])
    identity = exact(3 * np.eye(24), 4, 6, groups)
    ones = dict.fromkeys(identity.keys() - {"norm", "coupling"}, 1.0)
    assert identity == pytest.approx({"norm": 3 * 24**0.5, "coupling": 0.0, **ones})
    labels = groups.flatten().numpy()
    heads = exact(symmetric(24) * (labels[:, None] == labels), 4, 6, groups)
    assert heads["groups"] == pytest.approx(1)
    assert heads["coupling"] == 0
    assert heads["rows"] < 0.6
    grade = np.where(labels, 1, 30)  # one head with a far larger curvature
    plain, graded = (exact(np.outer(scale, scale) * symmetric(24), 4, 6, groups) for scale in (labels * 0 + 1, grade))
    assert graded["groups"] > 0.95 > plain["groups"]
    assert graded["coupling"] == pytest.approx(plain["coupling"])


def test_a_structureless_matrix_has_what_the_docstring_says():
    found = [exact(h + h.T, 4, 6, by_rows(4, 6, 2)) for h in np.random.default_rng(0).standard_normal((200, 24, 24))]
    means = {name: np.sqrt(np.mean([each[name] ** 2 for each in found])) for name in ("left", "right", "scalar")}
    means |= {name: np.mean([each[name] for each in found]) for name in ("rows", "groups", "coupling")}
    # the diagonal of h + h.T has twice the variance, which adds about 1 part in 24
    assert means["groups"] == pytest.approx(1 / 2, rel=0.05)
    assert means["coupling"] == pytest.approx(1, rel=0.05)
    assert means["rows"] == pytest.approx(1 / 4, rel=0.15)
    assert means["left"] == pytest.approx(1 / 6, rel=0.2)
    assert means["right"] == pytest.approx(1 / 4, rel=0.2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("groups", [None, by_rows(4, 6, 2), by_columns(4, 6, 3)])
def test_probed_shares_agree_within_their_errors(groups, seed):
    H = symmetric(24, seed)
    expected = reference(H, 4, 6, groups)
    shares = probed(H, 4, 6, groups, 150, seed)
    assert set(shares) == set(expected)
    for name, share in shares.items():
        assert abs(share.value - expected[name]) < 4 * share.error, name
        assert share.error < 0.15 * max(share.value, expected["norm"] if name == "norm" else 1), name


def test_standard_errors_are_the_spread_of_repetitions():
    H, groups = symmetric(24), by_rows(4, 6, 2)
    runs = [probed(H, 4, 6, groups, 30, seed) for seed in range(60)]
    for name in ("norm", "rows", "groups", "left", "right"):
        spread = np.std([run[name].value for run in runs], ddof=1)
        told = np.sqrt(np.mean([run[name].error ** 2 for run in runs]))
        assert told == pytest.approx(spread, rel=0.4), name


def test_squared_estimates_are_unbiased_at_the_fewest_sets():
    """Before the ratio and the root: the mean over many small estimates is the squared norm of the projection."""
    H, m, n = symmetric(12), 3, 4
    expected = reference(H, m, n)
    found = []
    for seed in range(400):
        shares = probed(H, m, n, None, 3, seed)
        found.append(shares["rows"].value * shares["norm"].value ** 2)
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - expected["rows"] * expected["norm"] ** 2) < 4 * error


def test_a_full_basis_of_signs_is_exact():
    """The columns of a Hadamard matrix are orthogonal, so their mean is no sample."""
    hadamard = np.array([[1.0]])
    for _ in range(4):
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    probes, H = torch.from_numpy(hadamard).reshape(16, 2, 8), symmetric(16)
    products = times(H, probes)
    expected = reference(H, 2, 8)
    assert mean(products.square().sum((1, 2))).value == pytest.approx(expected["norm"] ** 2)
    left, right = (trace / 16 for trace in partial_traces(probes, products))
    assert float(left.norm()) / 8**0.5 / expected["norm"] == pytest.approx(expected["left"])
    assert float(right.norm()) / 2**0.5 / expected["norm"] == pytest.approx(expected["right"])


def test_squares_within_groups():
    groups = torch.tensor([[0, 0, 1]])
    products = torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    assert squares_within(products, groups, torch.tensor([0, 1])).tolist() == [5.0, 36.0]


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, error = jackknife(lambda samples: values[samples].mean()[None], 20)
    plain = mean(values)
    assert (float(value), float(error)) == pytest.approx((plain.value, plain.error))


def test_signs_are_signs():
    drawn = signs(torch.Generator().manual_seed(0), 1000, 3)
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    assert drawn.mean().abs() < 0.05


def test_a_zero_block_has_no_shares_and_no_nan():
    zero = exact(np.zeros((6, 6)), 2, 3, by_rows(2, 3, 2))
    assert zero == dict.fromkeys(("norm", "rows", "groups", "coupling", "left", "right", "scalar"), 0.0)
    assert {share.value for share in probed(np.zeros((6, 6)), 2, 3, None, 3).values()} == {0.0}


def test_too_few_sets_have_no_error():
    with pytest.raises(ValueError, match="2 sets of probes have no standard error: add at least 3"):
        probed(np.eye(6), 2, 3, None, 2)
