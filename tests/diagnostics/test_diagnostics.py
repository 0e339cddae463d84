"""Spectra, noise, conditioning and the probe, against numpy in float64."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import asgo
import oracle
from asgo import ASGO, BAG, SPAM, Rule, Shampoo, View, route
from asgo.diagnostics import GradientProbe, Moments, spectra
from asgo.diagnostics.statistic import condition, damped, residual
from asgo.linalg.inverse_root import ROOTS

MEASURES = {
    "stable_rank": lambda s: (s**2).sum() / s[0] ** 2,
    "effective_rank": lambda s: np.exp(-sum(p * np.log(p) for p in s / s.sum() if p > 0)),
    "nuclear_over_frobenius": lambda s: s.sum() / np.sqrt((s**2).sum()),
}


def random_stack(seed, shape=(3, 4, 7), rank=None):
    rng = np.random.default_rng(seed)
    b, m, n = shape
    return rng.normal(size=(b, m, rank or min(m, n))) @ rng.normal(size=(b, rank or min(m, n), n))


def svd(matrix):
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)


# ---- spectra -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 9, 3), (1, 5, 5), (4, 1, 6), (1, 1, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e200])
@pytest.mark.parametrize("rank", [None, 1])
def test_singular_values_and_ranks(shape, scale, rank):
    stack = random_stack(0, shape, rank) * scale
    found = spectra.singular_values(torch.tensor(stack))
    expected = np.stack([svd(matrix) for matrix in stack])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-8 * expected.max())
    for name, measure in MEASURES.items():
        np.testing.assert_allclose(
            getattr(spectra, name)(found), [measure(s / scale) for s in expected], rtol=1e-6, err_msg=name
        )


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_laws_of_ranks(seed, rank, m, n):
    """Between 1 and the rank, blind to scale, transposition and rotation; a stack gives what each matrix gives."""
    stack = torch.tensor(random_stack(seed, (2, m, n), rank))
    rotated = torch.linalg.qr(torch.tensor(random_stack(seed + 1, (2, m, m))))[0] @ (-3e5 * stack)
    largest = min(rank, m, n)
    for name, most in (("stable_rank", largest), ("effective_rank", largest), ("nuclear_over_frobenius", largest**0.5)):
        measure = getattr(spectra, name)
        values = measure(spectra.singular_values(stack))
        assert (values >= 1 - 1e-9).all()
        assert (values <= most + 1e-4).all()
        for other in (stack.mT, rotated):
            torch.testing.assert_close(measure(spectra.singular_values(other)), values, rtol=1e-5, atol=1e-5)
        alone = torch.cat([measure(spectra.singular_values(one[None])) for one in stack])
        torch.testing.assert_close(alone, values, rtol=1e-6, atol=0)  # a share of 1e-16 has a root of 1e-8


def test_what_has_no_spectrum():
    stack = torch.tensor(random_stack(0, (4, 3, 5)))
    stack[0], stack[1, 2, 2], stack[2, 0, 0] = 0, math.nan, math.inf
    values = spectra.singular_values(stack)
    assert (values[0] == 0).all()
    assert values[1:3].isnan().all()
    np.testing.assert_allclose(values[3], svd(stack[3]), rtol=1e-7)
    for name in MEASURES:
        assert getattr(spectra, name)(values).isfinite().tolist() == [False, False, False, True]
    assert spectra.singular_values(torch.zeros(2, 0, 5)).shape == (2, 0)
    assert spectra.singular_values(stack[3:].bfloat16()).dtype == torch.float64


# ---- noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [False, True])
def test_signal_and_noise(summed):
    gradients = np.random.default_rng(0).normal(size=(5, 3, 4, 7)) + 1
    moments = Moments()
    for gradient in gradients:
        moments.add(torch.tensor(gradient))
    signal, noise = moments.split(summed)
    mean = gradients.mean(0)
    scatter = ((gradients - mean) ** 2).sum((0, 2, 3)) / 4
    factor = 25 if summed else 1
    np.testing.assert_allclose(noise, factor * scatter / 5, rtol=1e-12)
    np.testing.assert_allclose(signal, factor * ((mean**2).sum((1, 2)) - scatter / 5), rtol=1e-12)


def test_signal_and_noise_have_no_bias():
    """Over all pairs that can be drawn, with replacement, from a population, they average to the truth."""
    population = np.random.default_rng(1).normal(size=(4, 1, 3, 2))
    estimates = []
    for first in population:
        for second in population:
            moments = Moments()
            for gradient in (first, second):
                moments.add(torch.tensor(gradient))
            estimates.append([float(x) for x in moments.split()])
    mean = population.mean(0)
    spread = ((population - mean) ** 2).sum() / 4
    np.testing.assert_allclose(np.mean(estimates, 0), [(mean**2).sum(), spread / 2], rtol=1e-12)


def test_one_microbatch_tells_no_noise_and_half_precision_is_kept_in_float32():
    moments = Moments()
    with pytest.raises(ValueError, match="has seen no gradient"):
        moments.split()
    moments.add(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert moments.mean.dtype == torch.float32
    assert all(part.isnan().all() for part in moments.split())
    moments.add(torch.full((2, 3, 4), 1 + 2**-12))  # lost in bfloat16
    assert (moments.split()[1] > 0).all()


# ---- conditioning --------------------------------------------------------------------------------------------


def damping(A, root, eps):
    eye = np.eye(len(A))
    if root == "outside":
        half = oracle.power(A, 0.5) + eps * eye
        return half @ half
    return A + eps * {"inside": 1, "reference": 0}.get(root, np.linalg.norm(A)) * eye


@pytest.mark.parametrize("root", ["eigh", "inside", "outside", "reference"])
def test_damped_statistics(root):
    stack = random_stack(3, (2, 6, 9))
    A = stack @ stack.transpose(0, 2, 1)
    of, expected = damped(torch.tensor(A), root, 1e-3), [damping(one, root, 1e-3) for one in A]
    np.testing.assert_allclose(of, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(condition(of), [np.linalg.cond(one) for one in expected], rtol=1e-6)


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_inverts_the_damped_statistic(root):
    eps = 1e-3
    stack = random_stack(3, (2, 6, 9))
    A = stack @ stack.transpose(0, 2, 1)
    Z, _ = ROOTS[root](torch.tensor(A), eps)
    of = damped(torch.tensor(A), root, eps)
    left = [np.linalg.norm(z @ one @ z.T - np.eye(6)) / 6**0.5 for z, one in zip(Z.numpy(), of.numpy(), strict=True)]
    np.testing.assert_allclose(residual(of, Z), left, rtol=1e-6, atol=1e-9)
    assert (residual(of, Z) < (5e-2 if root == "reference" else 1e-6)).all()
    assert (residual(of, 0 * Z) == 1).all()


def test_condition_of_what_has_none():
    A = torch.stack([torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 1.0, 0.0])), torch.full((3, 3), math.nan)])
    found = condition(A)
    assert found[0].isnan()
    assert found[1].isinf()
    assert found[2].isnan()


# ---- the probe -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads, a bias, and a matrix that the loss does not use."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.q_proj = nn.Linear(6, 8)
        self.k_proj = nn.Linear(6, 8, bias=False)
        self.unused = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return (self.q_proj(x) * self.k_proj(x)).tanh()


def attention():
    torch.manual_seed(0)
    return Attention(), torch.randn(5, 8, 6), torch.randn(5, 8, 8)


def error(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, xs, ys, probe=None, parts=1):
    """A step on each batch; returns the gradients, and the weights before and after."""
    seen = []
    for x, y in zip(xs, ys, strict=True):
        if probe is not None and parts == 1:
            probe.split(error(model, a, b) for a, b in zip(x.chunk(4), y.chunk(4), strict=True))
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (error(model, a, b) / parts).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        seen.append((gradients, before, {name: p.detach().clone() for name, p in model.named_parameters()}))
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("parts", [1, 4])
def test_samples_against_numpy(parts):
    model, xs, ys = attention()
    optimizer = ASGO(route(model, per_head=True), lr=1e-2)
    probe = GradientProbe(optimizer, every=2)
    seen = train(model, optimizer, xs, ys, probe, parts)
    assert sorted({s.step for s in probe.samples}) == [1, 2, 4]
    keys = {(s.name, s.part, s.index, s.rows, s.columns) for s in probe.samples}
    assert keys == {
        *((f"{side}_proj.weight", 0, head, 4, 6) for side in "qk" for head in (0, 1)),
        ("unused.weight", 0, 0, 5, 3),
    }
    for sample in probe.samples:
        gradients, before, after = seen[sample.step - 1]
        rows = slice(4 * sample.index, 4 * sample.index + sample.rows)
        old, new = (np.asarray(weights[sample.name][rows], dtype=np.float64) for weights in (before, after))
        assert sample.update_rms == pytest.approx(np.sqrt(np.mean((new - old) ** 2)), rel=1e-9)
        assert sample.weight_rms == pytest.approx(np.sqrt(np.mean(old**2)), rel=1e-9)
        assert sample.failed_share == 0
        if sample.name == "unused.weight":
            assert sample.note == "no gradient"
            assert sample.stable_rank is sample.noise is sample.gradient_norm is None
            continue
        gradient = np.asarray(gradients[sample.name][rows], dtype=np.float64)
        values = svd(gradient)
        np.testing.assert_allclose(sample.singular_values, values, rtol=1e-6, atol=1e-7 * values[0])
        assert sample.gradient_norm == pytest.approx(np.linalg.norm(gradient))
        for name, measure in MEASURES.items():
            assert getattr(sample, name) == pytest.approx(measure(values), rel=1e-5), name
        assert sample.signal + sample.noise == pytest.approx(np.linalg.norm(gradient) ** 2, rel=1e-4)
        assert sample.noise_share == pytest.approx(sample.noise / (sample.signal + sample.noise))
        assert sample.note == ""
    last = [s for s in probe.samples if s.name == "q_proj.weight" and s.step == 4]
    assert probe.done == 5
    assert len(last) == 2
    assert probe.seconds > 0


def test_splitting_and_accumulating_see_the_same_noise():
    found = {}
    for parts in (1, 4):
        model, xs, ys = attention()
        optimizer = ASGO(route(model), lr=1e-2)
        probe = GradientProbe(optimizer)
        train(model, optimizer, xs[:1], ys[:1], probe, parts)
        found[parts] = [(s.signal, s.noise) for s in probe.samples if not s.note]
    np.testing.assert_allclose(found[1], found[4], rtol=1e-4)
    # and the same as numpy sees
    model, xs, ys = attention()
    parts = []
    for a, b in zip(xs[0].chunk(4), ys[0].chunk(4), strict=True):
        parts.append(torch.autograd.grad(error(model, a, b), model.q_proj.weight)[0].double().numpy())
    scatter = sum(np.sum((g - np.mean(parts, 0)) ** 2) for g in parts) / 3
    assert found[1][0][1] == pytest.approx(scatter / 4, rel=1e-5)


def test_condition_and_residual_are_those_of_the_optimizers_state():
    model, xs, ys = attention()
    optimizer = ASGO(route(model, per_head=True), lr=1e-2, eps=1e-4, root="eigh64")
    probe = GradientProbe(optimizer, every=5)
    train(model, optimizer, xs, ys)
    state = optimizer.state[model.q_proj.weight]
    for sample in [s for s in probe.samples if s.name == "q_proj.weight" and s.step == 5]:
        A, Z = (state[key][sample.index].double().numpy() for key in ("gram", "root"))
        of = damping(A, "eigh64", 1e-4)
        assert sample.condition == pytest.approx(np.linalg.cond(of), rel=1e-4)
        assert sample.residual == pytest.approx(np.linalg.norm(Z @ of @ Z.T - np.eye(4)) / 2, rel=1e-3)
        assert sample.residual < 1e-4


def test_nothing_that_trains_is_changed():
    weights, draws = [], []
    for with_probe in (False, True):
        model, xs, ys = attention()
        model.q_proj.register_forward_pre_hook(lambda module, inputs: nn.functional.dropout(inputs[0], 0.5))
        optimizer = ASGO(route(model), lr=1e-2)
        probe = GradientProbe(optimizer, every=2) if with_probe else None
        train(model, optimizer, xs, ys, probe)
        weights.append([p.detach().clone() for p in model.parameters()])
        draws.append(torch.rand(3))
    for plain, probed in zip(*weights, strict=True):
        assert torch.equal(plain, probed)
    assert torch.equal(*draws)


def test_a_root_that_is_not_refreshed_shows_as_residual():
    found = {}
    for interval in (1, 100):
        model, xs, ys = attention()
        optimizer = ASGO(route(model), lr=1e-2, precondition_frequency=interval)
        xs, ys = xs.repeat(4, 1, 1), ys.repeat(4, 1, 1)
        with GradientProbe(optimizer, every=20) as probe:
            train(model, optimizer, xs, ys)
        found[interval] = max(s.residual for s in probe.samples if s.step == 20 and not s.note)
    assert found[1] < 2e-2 < 0.1 < found[100]


def test_what_cannot_be_measured_is_marked_and_the_rest_is_measured():
    model, xs, ys = attention()
    optimizer = ASGO(route(model, per_head=True), lr=1e-2)
    probe = GradientProbe(optimizer, every=2)
    train(model, optimizer, xs[:1], ys[:1])
    error(model, xs[1], ys[1]).backward()
    model.q_proj.weight.grad[0, 0] = math.nan
    model.k_proj.weight.grad[4:] = 0
    optimizer.step()
    last = {(s.name[0], s.index): s for s in probe.samples if s.step == 2}
    assert {key: s.note for key, s in last.items()} == {
        ("q", 0): "gradient not finite",
        ("q", 1): "",
        ("k", 0): "",
        ("k", 1): "gradient is zero",
        ("u", 0): "no gradient",
    }
    assert last["q", 0].failed_share == 0.5
    assert last["q", 1].failed_share == 0
    assert last["q", 0].stable_rank is last["k", 1].stable_rank is None
    assert last["q", 0].singular_values == ()
    assert last["q", 0].condition is not None  # the statistic is as it was
    assert last["q", 1].stable_rank >= 1
    assert last["q", 1].noise is None  # one microbatch
    for sample in last.values():
        numbers = [v for f in fields(sample) if isinstance(v := getattr(sample, f.name), float)]
        assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize(
    ("make", "has_root"),
    [
        (lambda groups: ASGO.theory(groups, lr=1e-2), True),
        (ASGO.paper, True),
        (lambda groups: asgo.OneSidedShampoo(groups, lr=1e-2), True),
        (lambda groups: Shampoo(groups, lr=1e-2), True),
        (lambda groups: Shampoo(groups, lr=1e-2, max_size=6), True),
        (asgo.DASGO, False),
        (lambda groups: BAG(groups, lr=1e-2), False),
        (asgo.AdaBlock, False),
        (asgo.AdaGram, False),
        (asgo.AGD, False),
    ],
)
def test_any_optimizer_of_the_library(make, has_root):
    model, xs, ys = attention()
    optimizer = make(route(model))
    probe = GradientProbe(optimizer)
    train(model, optimizer, xs[:1], ys[:1], probe)
    measured = [s for s in probe.samples if not s.note]
    assert len(measured) == 2
    for sample in measured:
        assert sample.stable_rank >= 1
        assert sample.noise > 0
        assert (sample.residual is not None) == (sample.condition is not None) == has_root
        assert not has_root or sample.residual < 1e-2


def test_parts_experts_and_empty_parameters():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(12, 4))
    empty, experts = nn.Parameter(torch.zeros(5, 0)), nn.Parameter(torch.randn(3, 2, 4))
    groups = [
        {"params": [("fused", fused)], "view": View("m n -> 1 m n", split=(4, 4, 4))},
        {"params": [("empty", empty)], "view": View("m n -> 1 m n")},
        {"params": [("experts", experts)], "view": View("e m n -> e m n")},
        {"params": [("bias", nn.Parameter(torch.zeros(3)))], "view": None},
    ]
    optimizer = ASGO(groups)
    probe = GradientProbe(SPAM(optimizer).optimizer)
    (fused.square().sum() + experts.pow(4).sum()).backward()
    optimizer.step()
    parts = [(s.name, s.part, s.index) for s in probe.samples]
    assert parts == [*(("fused", i, 0) for i in range(3)), *(("experts", 0, i) for i in range(3))]


def test_a_step_that_was_given_up_is_forgotten():
    model, xs, ys = attention()
    optimizer = ASGO(route(model))
    probe = GradientProbe(optimizer)
    for _ in range(3):
        (1e3 * error(model, xs[1], ys[1])).backward()
    optimizer.zero_grad()
    train(model, optimizer, xs[:1], ys[:1], parts=2)
    model, xs, ys = attention()
    optimizer = ASGO(route(model))
    other = GradientProbe(optimizer)
    train(model, optimizer, xs[:1], ys[:1], parts=2)
    assert [s.noise for s in probe.samples] == [s.noise for s in other.samples]


def test_a_probe_goes_on_where_another_stopped_and_lets_go():
    model, xs, ys = attention()
    optimizer = ASGO(route(model))
    with GradientProbe(optimizer, every=2) as first:
        train(model, optimizer, xs[:1], ys[:1])
    with GradientProbe(optimizer, every=2, done=1) as second:
        assert second.due
        train(model, optimizer, xs[1:4], ys[1:4])
    assert not second.due
    assert sorted({s.step for s in first.samples}) == [1]
    assert sorted({s.step for s in second.samples}) == [2, 4]
    train(model, optimizer, xs[4:], ys[4:])
    assert second.done == 4
    second.split(error(model, xs[0], ys[0]) for _ in "ab")
    assert not model.q_proj.weight._backward_hooks


def test_errors_of_the_probe():
    model, xs, ys = attention()
    optimizer = ASGO(route(model))
    with pytest.raises(TypeError, match="GradientProbe reads optimizers of this library, such as asgo.ASGO; got SGD"):
        GradientProbe(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match="Of a SPAM, pass its attribute optimizer"):
        GradientProbe(SPAM(optimizer))
    with pytest.raises(ValueError, match="every must be a whole number of steps >= 1; got 0"):
        GradientProbe(optimizer, every=0)
    with pytest.raises(ValueError, match="done must be a whole number of steps >= 0; got -1"):
        GradientProbe(optimizer, done=-1)
    with pytest.raises(ValueError, match="has no matrices, all of its parameters go to AdamW"):
        GradientProbe(ASGO(route(model, [Rule("*", None)])))
    probe = GradientProbe(optimizer)
    with pytest.raises(ValueError, match=r"split: the loss must be one number; got a tensor \(8, 8\)"):
        probe.split([model(xs[0])])
    with pytest.raises(TypeError, match="split: the loss must be a tensor of one number; got float"):
        probe.split([1.0])
    with pytest.raises(ValueError, match="depends on no parameter"):
        probe.split([error(model, xs[0], ys[0]).detach()])
