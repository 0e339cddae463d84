"""Advice: its evidence against numpy in float64, its decisions on gradients that were made for them, its manners."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import asgo
from asgo import ASGO, Rule, View, advise, route
from asgo.diagnostics.advice import COLUMNS
from asgo.lab.errors import LabError
from asgo.lab.optimizers.rules import read_rules, write_rules


class Given(nn.Module):
    """Matrices whose gradients are the batches: the loss is their inner product with them."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float64)))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj = (nn.Linear(6, 8, bias=False, dtype=torch.float64) for _ in "qk")


def inner(model, batch):
    return sum((dict(model.named_parameters())[name] * G).sum() for name, G in batch.items())


def draw(shape, count, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(count, *shape)))


def only(advice):
    (line,) = advice.lines
    return line


def nuclear(A):
    """tr A^(1/2) of a gram."""
    return np.sqrt(np.linalg.eigvalsh(A).clip(0)).sum()


# ---- evidence ------------------------------------------------------------------------------------------------


def test_evidence_against_numpy():
    gradients = draw((8, 6), 12) + 1
    batches = [{"q_proj.weight": G, "k_proj.weight": 2 * G} for G in gradients]
    query, key = advise(Heads(), batches, inner).lines
    G = gradients.numpy()
    bound = {
        ("whole", "left"): nuclear(np.einsum("tij,tkj->ik", G, G)),
        ("whole", "right"): nuclear(np.einsum("tji,tjk->ik", G, G)),
        ("heads", "left"): sum(nuclear(np.einsum("tij,tkj->ik", h, h)) for h in (G[:, :4], G[:, 4:])),
        ("heads", "right"): sum(nuclear(np.einsum("tji,tjk->ik", h, h)) for h in (G[:, :4], G[:, 4:])),
    }
    bound |= {("whole", "auto"): bound["whole", "right"], ("heads", "auto"): bound["heads", "left"]}
    least = min(bound.values())
    assert query.evidence.bound.keys() == bound.keys()
    for choice, value in bound.items():
        assert query.evidence.bound[choice] == pytest.approx(value / least, rel=1e-6)
        assert key.evidence.bound[choice] == pytest.approx(value / least, rel=1e-6)  # blind to scale
    cost = {"left": (8**3, 2 * 4**3), "right": (6**3, 2 * 6**3), "auto": (6**3, 2 * 4**3)}
    assert query.evidence.cost == {(w, s): cost[s][i] for i, w in enumerate(("whole", "heads")) for s in cost}
    mean = G.mean(0)
    noise = ((G - mean) ** 2).sum() / 11
    signal = (mean**2).sum() - noise / 12
    assert query.evidence.noise_share == pytest.approx(noise / (signal + noise))
    values = np.linalg.svd(mean, compute_uv=False)
    assert query.evidence.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)


@pytest.mark.parametrize(("statistic", "betas"), [("momentum", (0.95, 0.2)), ("gradient", (0.9, 0.8))])
def test_what_an_old_root_keeps_against_numpy(statistic, betas):
    gradients = draw((3, 5), 12)
    found = only(advise(Given(w=(3, 5)), [{"w": G} for G in gradients], inner)).evidence.kept
    momentum, gram, old = np.zeros((3, 5)), np.zeros((3, 3)), None
    for t, G in enumerate(gradients.numpy()):
        momentum = betas[0] * momentum + (1 - betas[0]) * G
        direction = betas[0] * momentum + (1 - betas[0]) * G
        S = direction if statistic == "momentum" else G
        gram = betas[1] * gram + (1 - betas[1]) * S @ S.T
        values, vectors = np.linalg.eigh(gram + 1e-6 * np.linalg.norm(gram) * np.eye(3))
        fresh = vectors / np.sqrt(values) @ vectors.T
        old = fresh if t == 2 else old  # 9 steps before the last
        interval = {3: 2, 6: 5, 11: 10}.get(t)
        if interval:
            a, b = (old @ direction).ravel(), (fresh @ direction).ravel()
            expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found[statistic, interval] == pytest.approx(expected, rel=1e-6)


# ---- decisions -----------------------------------------------------------------------------------------------


def one_sided(left, count=12):
    """Square gradients that share their column space (left) or row space."""
    u, v = draw((6, 1), 1)[0], draw((6, 1), count, 1)
    gradients = u @ v.mT
    return [{"w": G if left else G.mT} for G in gradients]


def test_the_side_is_the_one_with_the_smaller_bound():
    model = Given(w=(6, 6))
    assert only(advise(model, one_sided(True), inner)).side == "left"
    assert only(advise(model, one_sided(False), inner)).side == "auto"  # of a square matrix, the right one
    # as good within 5 %: the default
    assert only(advise(model, [{"w": G} for G in draw((6, 6), 40)], inner)).side == "auto"


def test_a_longer_side_must_pay():
    wide = [{"w": torch.cat([batch["w"].mT, 0 * batch["w"]], 1)} for batch in one_sided(True)]
    line = only(advise(Given(w=(6, 12)), wide, inner))
    assert line.evidence.bound["whole", "right"] == 1
    assert line.evidence.bound["whole", "left"] > 1.5
    assert line.side == "right"
    assert line.evidence.cost["whole", "right"] == 12**3


@pytest.mark.parametrize(
    ("curvature", "side"),
    [
        ({"left": 0.4, "right": 0.2}, "left"),
        ({"left": 0.2, "right": 0.4}, "auto"),
        ({"left": 0.4, "right": 0.41}, "left"),
        ({"left": 0, "right": 0}, "left"),
    ],
)
def test_curvature_has_a_veto(curvature, side):
    line = only(advise(Given(w=(6, 6)), one_sided(True), inner, {"w": curvature}))
    assert line.side == side
    assert line.curvature == curvature
    assert f"{curvature['left']:.2f}/{curvature['right']:.2f}" in str(asgo.Advice((line,)))


def test_heads_that_do_not_meet_are_read_apart():
    both = draw((8, 1), 1)[0] @ draw((6, 1), 30, 1).mT  # one column space
    apart = both.clone()
    apart[::2, :4] = 0  # one head at a time: no correlation between them
    apart[1::2, 4:] = 0
    whole = both
    batches = [{"q_proj.weight": a, "k_proj.weight": w} for a, w in zip(apart, whole, strict=True)]
    query, key = advise(Heads(), batches, inner).lines
    assert (query.word, query.side) == ("heads", "auto")
    assert query.evidence.bound["heads", "left"] == pytest.approx(1)
    assert query.view == View("(h d) n -> h d n", {"h": 2})
    assert (key.word, key.side) == ("whole", "left")
    assert key.evidence.bound["heads", "left"] > 1.2


@pytest.mark.parametrize(("count", "interval"), [(12, 10), (5, 5), (3, 2), (2, 2)])
def test_the_interval_is_as_long_as_the_root_keeps(count, interval):
    steady = draw((4, 6), 1)[0]
    line = only(advise(Given(w=(4, 6)), [{"w": steady}] * count, inner))
    assert line.interval == interval
    assert line.statistic == "gradient"  # no noise at all
    changing = draw((4, 1), 12) @ draw((1, 6), 12, 1)
    assert only(advise(Given(w=(4, 6)), [{"w": G} for G in changing], inner)).interval == 1


@pytest.mark.parametrize(("noise", "statistic"), [(0.2, "gradient"), (0.5, "momentum"), (2.0, "momentum")])
def test_the_statistic_is_averaged_where_noise_rules(noise, statistic):
    batches = [{"w": 1 + noise * G} for G in draw((5, 7), 40)]
    line = only(advise(Given(w=(5, 7)), batches, inner))
    assert line.statistic == statistic
    assert line.evidence.noise_share == pytest.approx(noise**2 / (1 + noise**2), rel=0.1)


def test_the_opposite_has_the_worst_bound_that_costs_no_more():
    model = Given(w=(6, 6), v=(4, 9))
    batches = [batch | {"v": G} for batch, G in zip(one_sided(False), draw((4, 9), 12), strict=True)]
    w, v = advise(model, batches, inner).against
    assert w.options == {"side": "left"}
    assert v.options == {}  # the longer side is dearer
    assert route(model, [w, v])[0]["side"] == "left"
    query, _ = advise(Heads(), [{"q_proj.weight": G, "k_proj.weight": G} for G in draw((8, 6), 12)], inner).lines
    worst = max((c for c, cost in query.evidence.cost.items() if cost <= 6**3), key=query.evidence.bound.get)
    assert worst == ("heads", "auto")


def test_advice_can_be_followed(tmp_path):
    model = Given(w=(6, 6), v=(4, 6), bias=(3,))
    batches = [batch | {"v": 1 + 3 * G} for batch, G in zip(one_sided(True), draw((4, 6), 12), strict=True)]
    advice = advise(model, batches, inner)
    assert [line.name for line in advice.lines] == ["w", "v"]
    for rules in (advice.rules, saved(tmp_path, advice.rules)):
        groups = {group["params"][0][0]: group for group in route(model, rules)}
        assert groups["w"]["side"] == "left"
        assert "side" not in groups["v"]
        assert groups["bias"]["views"] == [None]
        optimizer = ASGO(list(groups.values()))
        inner(model, batches[0]).backward()
        optimizer.step()
    table = str(advice).splitlines()
    assert table[0].split()[:5] == list(COLUMNS)
    assert table[1].split()[:3] == ["w", "whole", "left"]


def saved(tmp_path, rules):
    write_rules(tmp_path / "rules.json", rules)
    json.loads((tmp_path / "rules.json").read_text())
    found = read_rules(str(tmp_path / "rules.json"))
    assert [(r.match, r.view, r.options) for r in found] == [(r.match, r.view, r.options) for r in rules]
    return found


def test_names_with_the_signs_of_a_pattern_are_meant_as_they_are():
    model = nn.ModuleDict({"a[b]": nn.Linear(3, 3, bias=False)}).double()
    advice = advise(model, [{"a[b].weight": G} for G in draw((3, 3), 4)], inner)
    (group,) = route(model, advice.rules)
    assert group["params"][0][0] == "a[b].weight"


def test_rules_that_cannot_be_read(tmp_path):
    with pytest.raises(LabError, match=r"rules=.*none.json cannot be read: No such file"):
        read_rules(str(tmp_path / "none.json"))
    (tmp_path / "other.json").write_text('[{"view": null}]')
    with pytest.raises(LabError, match=r"holds no rules \(KeyError: 'match'\)"):
        read_rules(str(tmp_path / "other.json"))
    assert read_rules(None) == []


# ---- manners -------------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Buffers that a forward pass changes, random numbers, a mixture of modes, gradients that stand there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.drop, self.spare = nn.Dropout(0.5), nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


def fit(model, x):
    model.train()
    return model(x).square().mean()


def picture(model):
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: (None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    return tensors, grads, [m.training for m in model.modules()], torch.get_rng_state()


def same(before, after):
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old.keys() == new.keys()
        assert all((a is b is None) or torch.equal(a, b) for a, b in zip(old.values(), new.values(), strict=True))
    return before[2] == after[2] and torch.equal(before[3], after[3])


@pytest.mark.parametrize("bad", [None, "nan", "vector", "error"])
def test_nothing_is_changed(bad):
    model = Busy()
    model.norm.eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    xs = list(torch.randn(6, 5, 6))
    before = picture(model)

    def loss(model, x):
        value = fit(model, x)
        model.zero_grad()
        if x is xs[3] and bad:
            if bad == "error":
                raise RuntimeError("of the user's own")
            return value * math.nan if bad == "nan" else value.expand(3)
        return value

    if bad is None:
        advice = advise(model, xs, loss)
        notes = {line.name: line.note for line in advice.lines}
        assert notes == {"first.weight": "", "last.weight": "", "spare.weight": "no gradient"}
        assert "not measurable: no gradient" in str(advice)
        assert len(advice.rules) == 2
    else:
        with pytest.raises((ValueError, RuntimeError)):
            advise(model, xs, loss)
    assert same(before, picture(model))


def test_a_gradient_that_is_not_finite_is_marked_and_the_others_are_measured():
    batches = [{"w": G, "v": G.clone()} for G in draw((3, 4), 4)]
    batches[2]["v"][0, 0] = 1e308
    batches[2]["v"] *= 1e10
    model = Given(w=(3, 4), v=(3, 4))
    first, second = advise(model, batches, inner_of_finite).lines
    assert first.note == ""
    assert first.evidence.stable_rank >= 1
    assert second.note == "gradient of batch 3 not finite"


def inner_of_finite(model, batch):
    """Its value is finite where its gradient is not."""
    return sum((dict(model.named_parameters())[name] * G).nansum() for name, G in batch.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "two batches or more are needed to tell noise from signal; got 0"),
        ({"batches": [1]}, ValueError, "got 1"),
        ({"loss": 3}, TypeError, r"loss must be a function \(model, batch\) -> tensor; got int"),
        ({"loss": lambda m, b: 1.0}, TypeError, "advise, batch 1: the loss must be a tensor of one number; got float"),
        (
            {"loss": lambda m, b: m.w * b["w"]},
            ValueError,
            r"batch 1: the loss must be one number; got a tensor \(6, 6\). Reduce it",
        ),
        ({"loss": lambda m, b: inner(m, b) * math.nan}, ValueError, "advise, batch 1: the loss is nan"),
        ({"loss": lambda m, b: torch.zeros(())}, ValueError, "depends on no parameter"),
        ({"model": nn.LayerNorm(4)}, ValueError, "LayerNorm has no matrices, all of its parameters go to AdamW"),
        ({"model": "gpt"}, TypeError, "route needs a torch.nn.Module; got str"),
        ({"curvature": {"x": {}}}, ValueError, "curvature names 'x', which is no matrix of the model; it has 'w'"),
        ({"curvature": {"w": {"left": 1.0}}}, ValueError, "curvature of 'w' needs numbers >= 0 as 'left' and 'right'"),
        ({"curvature": {"w": {"left": 1.0, "right": math.nan}}}, ValueError, "needs numbers >= 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"model": Given(w=(6, 6)), "batches": one_sided(True), "loss": inner} | change
    with pytest.raises(error, match=message):
        advise(**arguments)


def test_batches_may_come_one_by_one():
    batches = one_sided(True)
    assert str(advise(Given(w=(6, 6)), iter(batches), inner)) == str(advise(Given(w=(6, 6)), batches, inner))


def test_a_side_that_is_too_long_is_not_measured():
    model, batches = Given(w=(3000, 2)), [{"w": G} for G in draw((3000, 2), 3)]
    line = only(advise(model, batches, inner))
    assert set(line.evidence.bound) == {("whole", "auto"), ("whole", "right")}
    assert line.side == "auto"
    assert isinstance(line.rule(), Rule)
