"""The theorems on random problems, the problems against autograd and sampling, the command."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from asgo.lab.errors import LabError
from experiments.theory import bounds, problem
from experiments.theory.__main__ import main
from experiments.theory.experiment import TheoryConfig, check, jobs
from experiments.theory.instance import ProblemConfig
from experiments.theory.methods import METHODS, Projection
from experiments.theory.play import TheoryJob, do, marks, play
from experiments.theory.problem import EXAMPLES
from experiments.theory.problems import PROBLEMS
from experiments.theory.report import Observation

DIALS = ProblemConfig("squares", 4, 6, 2, 0.1, 3.0, "left", False, 0.0, True, 2, 3, 0)
SMOOTH = ("squares", "logistic")
PROJECTIONS = {name: method for name, method in METHODS.items() if isinstance(method, Projection)}
SLACK = 1e-9


@st.composite
def plays(draw, problems=tuple(PROBLEMS), methods=tuple(METHODS), noisy=True):
    """Any problem with any dials, played by a method at three step sizes that six factors of ten may lie between."""
    m, n = draw(st.integers(2, 5)), draw(st.integers(2, 6))
    structure = draw(st.sampled_from(("left", "right", "both", "none")))
    side = {"left": m, "none": m, "right": n, "both": min(m, n)}[structure]
    dials = ProblemConfig(
        problem=draw(st.sampled_from(problems)),
        rows=m,
        columns=n,
        rank=draw(st.integers(1, side)),
        tail=draw(st.sampled_from((0.0, 0.01, 0.3, 1.0))),
        spread=draw(st.floats(1, min(m, n))),
        structure=structure,
        aligned=draw(st.booleans()),
        noise=draw(st.sampled_from((0.0, 0.1, 1.0))) if noisy else 0.0,
        white=draw(st.booleans()),
        batch=draw(st.sampled_from((1, 3))),
        repeats=1,
        seed=draw(st.integers(0, 2**16)),
    )
    steps = tuple(10**power for power in draw(st.lists(st.floats(-3, 3), min_size=3, max_size=3, unique=True)))
    rounds = draw(st.integers(1, 30))
    return TheoryJob(dials, draw(st.sampled_from(methods)), rounds, steps, marks(rounds))


def noted(job):
    """All that a play has noted: fields of ``(marks, repeats, steps)``."""
    return {name: torch.stack(values) for name, values in play(job).noted.items()}


# ---- the theorems ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(plays(methods=("asgo", "asgo-right")))
def test_regret_never_exceeds_its_bound(job):
    """The regret theorem, on every run: smooth or not, with noise or without, at any step size and after any round."""
    seen = noted(job)
    small = SLACK * (1 + seen["bound"].abs())
    assert (seen["regret"] <= seen["linear"] + small).all()
    assert (seen["linear"] <= seen["bound"] + small).all()


@settings(max_examples=40, deadline=None)
@given(plays(methods=("adagrad", "adagrad-norm", "full-adagrad", "shampoo")))
def test_nor_does_that_of_the_rivals(job):
    seen = noted(job)
    small = SLACK * (1 + seen["bound"].abs())
    assert (seen["regret"] <= seen["linear"] + small).all()
    assert (seen["linear"] <= seen["bound"] + small).all()


@settings(max_examples=40, deadline=None)
@given(plays(problems=SMOOTH, methods=tuple(PROJECTIONS), noisy=False))
def test_smooth_theorem_without_noise_holds_on_every_run(job):
    seen = noted(job)
    assert (seen["excess"] <= seen["rate"] * (1 + SLACK) + SLACK).all()


@settings(max_examples=40, deadline=None)
@given(plays(problems=SMOOTH, methods=tuple(PROJECTIONS)))
def test_the_inequality_behind_the_smooth_theorem_holds_with_the_noise_that_was_met(job):
    """On every run: ``S <= K (sqrt(2 tr(L) S) + ||N||_*) - sum <N_t, E_t> + slack``."""
    seen = noted(job)
    assert (seen["excess"] <= seen["path"] * (1 + SLACK) + SLACK).all()


@pytest.mark.parametrize("method", PROJECTIONS)
@pytest.mark.parametrize(("problem", "noise"), [("absolute", 0.5), ("hinge", 0.0), ("squares", 1.0), ("logistic", 1.0)])
def test_theorems_in_expectation(problem, noise, method):
    """The mean excess of many runs against the bound with the largest distance of all of them."""
    dials = replace(DIALS, problem=problem, noise=noise, repeats=60, batch=1)
    job = TheoryJob(dials, method, 40, (0.25, 1.0, 4.0), (40,))
    record = play(job)
    record.distance = record.distance.amax(0).expand_as(record.distance)
    record.note()
    assert (record.excess.mean(0) <= record.noted["rate"][-1].mean(0)).all()


@pytest.mark.parametrize("method", ["asgo", "adagrad-norm"])
def test_the_bounds_are_not_idle(method):
    """Half of them would be exceeded."""
    seen = noted(TheoryJob(replace(DIALS, spread=1.0, rank=1, tail=0.0), method, 30, (16.0, 64.0), marks(30)))
    assert (seen["linear"] / seen["bound"]).max() > 0.5


def test_largest_solution_of_the_smooth_inequality():
    k, trace, rest = (torch.tensor([value], dtype=torch.float64) for value in (1.5, 0.3, 0.7))
    S = bounds.smooth(k, trace, rest)
    torch.testing.assert_close(S, k * (2 * trace * S).sqrt() + rest)
    more = S * 1.001
    assert more > k * (2 * trace * more).sqrt() + rest


# ---- what the methods see ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
def test_moments_reduce_to_sums_of_measurements(name):
    method, grads = METHODS[name], torch.randn(7, 3, 4, dtype=torch.float64)
    flat = grads.flatten(1)
    (total,) = (measured.sum(0) for measured in method.measure(grads))
    reduced = method.reduce((flat.T @ flat)[None], 3, 4)[0]
    torch.testing.assert_close(reduced, total)
    projected, copies = method.expand(reduced[None], 3, 4)
    back = method.reduce(projected, 3, 4)[0]
    torch.testing.assert_close(back, copies * reduced if name != "adagrad-norm" else reduced)


@pytest.mark.parametrize("structure", ["left", "right", "both", "none"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_smoothness_bounds_the_trace(name, structure):
    """``(tr V^(1/2))^2 <= tr(L) sum <g, L^-1 g> <= tr(L) sum <g, H^-1 g>``, for gradients in the Hessian's range."""
    hessian = PROBLEMS["squares"](replace(DIALS, structure=structure)).moment()
    method, constant = METHODS[name], METHODS[name].of_hessian(hessian, 4, 6)
    for count in (1, 5, 40):
        source = torch.randn(len(hessian), count, 24, dtype=torch.float64)
        flat = source @ hessian  # g = H z, so <g, H^-1 g> = <z, H z>
        (statistic,) = method.measure(flat.view(-1, count, 4, 6))
        trace = method.trace((statistic.sum(1),))
        assert (trace.square() <= constant * (source * flat).sum((1, 2)) * (1 + SLACK)).all()


def test_smoothness_is_exact_where_the_hessian_has_the_structure():
    left, right = (PROBLEMS["squares"](replace(DIALS, structure=side)).moment() for side in ("left", "right"))
    by = {name: method.of_hessian for name, method in PROJECTIONS.items()}
    # A has Frobenius norm 1 and B is the identity over its own, so L = A A^T / 6
    torch.testing.assert_close(by["asgo"](left, 4, 6), torch.full((3,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(by["asgo-right"](right, 4, 6), torch.full((3,), 1 / 4, dtype=torch.float64))
    for hessian in (left, right):
        torch.testing.assert_close(by["adagrad-norm"](hessian, 4, 6), torch.linalg.eigvalsh(hessian)[:, -1])
        torch.testing.assert_close(by["full-adagrad"](hessian, 4, 6), torch.ones(3, dtype=torch.float64))
    assert (by["asgo"](left, 4, 6) < by["asgo-right"](left, 4, 6)).all()
    assert (by["asgo-right"](right, 4, 6) < by["asgo"](right, 4, 6)).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_asgo_moves_as_algorithm_1_says(side):
    """Against numpy: the excess after every round, at two step sizes, from the Hessian and W* alone."""
    # Structure on the side that is preconditioned, and full rank: elsewhere rounding errors can grow at large steps
    m, n = (4, 6) if side == "left" else (6, 4)
    dials = replace(DIALS, repeats=1, rows=m, columns=n, spread=4.0, structure=side)
    job = TheoryJob(dials, "asgo" if side == "left" else "asgo-right", 12, (0.5, 2.0), marks(12))
    record = play(job)
    problem = PROBLEMS["squares"](job.dials)
    target, hessian = problem.instance.target[0].numpy(), problem.moment()[0].numpy()
    for k, eta in enumerate(record.eta[0].tolist()):
        assert eta == pytest.approx(job.steps[k] / np.sqrt(2))  # ||W*||_op is 1
        weight, gram, total, seen = np.zeros((m, n)), np.zeros((4, 4)), 0.0, []
        for _ in range(12):
            error = (weight - target).reshape(-1)
            total += error @ hessian @ error / 2
            grad = (hessian @ error).reshape(m, n)
            gram += grad @ grad.T if side == "left" else grad.T @ grad
            root = oracle.outside_root(gram, 1e-8)
            weight = weight - eta * (root @ grad if side == "left" else grad @ root)
            seen.append(total)
        expected = [seen[mark - 1] for mark in job.marks]
        np.testing.assert_allclose([noted[0, k] for noted in record.noted["excess"]], expected, rtol=1e-6)


def test_adagrad_norm_moves_by_its_formula():
    record = play(TheoryJob(replace(DIALS, repeats=1), "adagrad-norm", 9, (1.0,), (9,)))
    problem = PROBLEMS["squares"](replace(DIALS, repeats=1))
    target, hessian = problem.instance.target[0].flatten().numpy(), problem.moment()[0].numpy()
    weight, square, total = np.zeros(24), 0.0, 0.0
    for _ in range(9):
        total += (weight - target) @ hessian @ (weight - target) / 2
        grad = hessian @ (weight - target)
        square += grad @ grad
        weight = weight - record.eta.item() * grad / (np.sqrt(square) + 1e-8)
    assert record.excess.item() == pytest.approx(total, rel=1e-9)


# ---- the problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["left", "right", "both", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_best_matrix_is_known(name, structure):
    problem = PROBLEMS[name](replace(DIALS, problem=name, structure=structure, spread=2.5))
    target = problem.instance.target
    torch.testing.assert_close(torch.linalg.matrix_norm(target, 2), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(target.square().sum((1, 2)), torch.full((3,), 2.5, dtype=torch.float64))
    at_best = problem.round(target[:, None])
    assert at_best.excess.abs().max() < 1e-12
    if problem.smooth:
        assert at_best.gradient.abs().max() < 1e-12
    near = target[:, None] + 1e-2 * torch.randn(3, 20, 4, 6, dtype=torch.float64)
    assert (problem.round(near).excess >= 0).all()
    zero = torch.zeros(3, 1, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(problem.round(zero).excess, problem.unit)


@pytest.mark.parametrize("structure", ["left", "none"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_those_of_the_losses(name, noise, structure):
    """Of what the round itself shows, by autograd."""
    problem = PROBLEMS[name](replace(DIALS, problem=name, noise=noise, structure=structure))
    weights = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    seen = problem.round(weights)
    (grad,) = torch.autograd.grad(seen.regret.sum(), weights)
    torch.testing.assert_close(seen.gradient.detach(), grad)


@pytest.mark.parametrize("structure", ["left", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_rounds_have_the_known_mean(name, structure):
    """The mean of ``f_t(W) - f_t(W*)`` over many examples is ``F(W) - F(W*)``, wrong labels and noise included."""
    problem = PROBLEMS[name](replace(DIALS, problem=name, noise=0.2, batch=20_000, structure=structure))
    weights = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    seen = problem.round(weights)
    torch.testing.assert_close(seen.regret, seen.excess, rtol=0.05, atol=0.05 * seen.excess.abs().max().item())


@pytest.mark.parametrize("structure", ["left", "right", "none"])
def test_second_moment_of_the_absolute_loss(structure):
    problem = PROBLEMS["absolute"](replace(DIALS, problem="absolute", structure=structure, repeats=1))
    x = problem.instance.outward(problem.instance.features(problem.draws, 40_000)).flatten(2)[0]
    assert torch.linalg.matrix_norm(x.T @ x / len(x) - problem.moment()[0]) < 0.02


def test_second_moment_of_the_hinge_loss_is_never_exceeded():
    dials = replace(DIALS, problem="hinge", batch=1, noise=0.3, repeats=1)
    problem = PROBLEMS["hinge"](dials)
    weights = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    grads = torch.cat([problem.round(weights).gradient[0] for _ in range(4 * EXAMPLES)]).flatten(1)
    room = torch.linalg.eigvalsh(1.1 * problem.moment()[0] - grads.T @ grads / len(grads))
    assert room.min() > -1e-12


@pytest.mark.parametrize("structure", ["left", "none"])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_hessian_exceeds_the_smoothness(name, structure):
    problem = PROBLEMS[name](replace(DIALS, problem=name, structure=structure, repeats=1))
    for scale in (0.0, 1.0, 5.0):
        weights = scale * torch.randn(24, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda w: problem.value(w.view(1, 1, 4, 6))[0].sum(), weights)
        room = torch.linalg.eigvalsh(problem.moment()[0] - hessian)
        assert room.min() > -1e-9
        assert name == "logistic" or room.max() < 1e-9


@pytest.mark.parametrize("structure", ["left", "none"])
@pytest.mark.parametrize("white", [True, False])
def test_covariance_of_the_noise(white, structure):
    dials = replace(DIALS, noise=0.7, white=white, structure=structure, repeats=1, batch=4)
    problem = PROBLEMS["squares"](dials)
    zero = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    noise = torch.stack([problem.round(zero).noise.flatten() for _ in range(4000)])
    known = problem.covariance()[0]
    first = problem.value(zero)[1].norm()
    assert known.trace().item() == pytest.approx(0.7**2 / 4 * first.item() ** 2)
    assert torch.linalg.matrix_norm(noise.T @ noise / len(noise) - known) < 0.1 * torch.linalg.matrix_norm(known)


@pytest.mark.parametrize("name", PROBLEMS)
def test_rank_of_gradients(name):
    for structure in ("left", "right", "both", "none"):
        problem = PROBLEMS[name](replace(DIALS, problem=name, tail=0.0, white=False, structure=structure, batch=1))
        for _ in range(5):
            grad = problem.round(torch.randn(3, 2, 4, 6, dtype=torch.float64)).gradient
            assert (torch.linalg.matrix_rank(grad, rtol=1e-9) <= problem.gradient_rank).all()


def test_the_rotated_problem_is_the_same_to_methods_without_structure():
    """In a random basis of all entries AdaGrad-Norm and full-matrix AdaGrad see the same spectrum, ASGO another."""
    left, none = (PROBLEMS["squares"](replace(DIALS, structure=s)).moment() for s in ("left", "none"))
    for name in ("adagrad-norm", "full-adagrad", "asgo"):
        own = [PROJECTIONS[name].of_hessian(hessian, 4, 6) for hessian in (left, none)]
        assert torch.allclose(*own) == (name != "asgo")


def test_repeats_do_not_depend_on_their_number():
    few, many = (play(TheoryJob(replace(DIALS, problem="hinge", repeats=r), "asgo", 5, (1.0,), (5,))) for r in (1, 3))
    torch.testing.assert_close(few.excess, many.excess[:1])
    assert not torch.equal(many.excess[0], many.excess[1])


def test_a_best_matrix_that_tells_nothing_apart(monkeypatch):
    made = problem.make
    monkeypatch.setattr(problem, "make", lambda dials: replace(made(dials), target=0 * made(dials).target))
    with pytest.raises(LabError, match="tells no classes apart with these dials. Pass another --seed"):
        PROBLEMS["hinge"](replace(DIALS, problem="hinge"))


# ---- the report --------------------------------------------------------------------------------------------------


def fake(regret, bound, steps=(1.0,), rounds=100):
    at = marks(rounds)
    shape = (len(at), 1, len(steps))
    values = {name: np.ones(shape) for name in ("linear", "excess", "rate", "path", "distance", "trace")}
    values |= {"eta": np.ones((1, 1, len(steps))), "unit": np.full((1, 1, len(steps)), 2.0)}
    values |= {"regret": regret(np.array(at, dtype=float))[:, None, :], "bound": np.full(shape, bound)}
    job = TheoryJob(DIALS, "asgo", rounds, steps, at)
    return Observation.of(job, {name: value.tolist() for name, value in values.items()})


def test_slopes_and_breaks():
    seen = fake(lambda at: np.stack([at**0.5, at**0.25], 1), 5.0, (1.0, 4.0))
    assert seen.best() == 1
    assert seen.slope("regret") == pytest.approx(-0.75)
    assert seen.above().any(0).tolist() == [[True, False]]
    assert seen.ratio() == pytest.approx([2.0, 100**0.25 / 5])
    assert seen.mean("regret")[-1] == pytest.approx([0.1 / 2, 100**-0.75 / 2])


def test_what_is_not_a_number_is_a_break_and_never_the_best():
    seen = fake(lambda at: np.stack([np.full_like(at, np.nan), at], 1), 1e9, (1.0, 4.0))
    assert seen.best() == 1
    assert seen.above().any(0).tolist() == [[True, False]]


# ---- the command -------------------------------------------------------------------------------------------------

FLAGS = (
    "--rows 3 --columns 4 --spread 2 --rounds 20 --repeats 2 --batch 2 --steps 0.25 1 4 --sweep-rounds 5 "
    "--sweep-ranks 1 3 --sweep-spreads 1 3 --sweep-problems squares --processes 1"
)
SMALL = FLAGS.split()


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "theory"
    words = [*SMALL, "--problems", "absolute", "squares", "--out", str(out)]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "asgo: the regret is below its bound in all 6 runs" not in shown  # two problems: twelve
    assert "asgo: the regret is below its bound in all 12 runs and 24 of the map" in shown
    assert "squares, map of 4 points: smallest regret" in shown
    for name in ("plot.png", "steps.png", "sweep.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    tables = {name: list(csv.DictReader((out / name).open())) for name in ("table.csv", "curves.csv", "sweep.csv")}
    assert len(tables["table.csv"]) == 2 * 6 * 3
    assert len(tables["curves.csv"]) == 2 * 6 * len(marks(20))
    assert len(tables["sweep.csv"]) == 4 * 6
    assert all(float(row["largest_ratio"]) <= 1 and row["breaks"] == "0" for row in tables["table.csv"])
    assert {row["method"] for row in tables["table.csv"] if not row["rate"]} == {"shampoo"}
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("python -m experiments.theory")
    monkeypatch.setattr(TheoryJob, "run", None)
    assert main(["--out", str(out), "--resume"]) == 0


def test_without_a_map(tmp_path):
    words = [*SMALL, "--problems", "logistic", "--methods", "asgo", "--noise", "0.5", "--noise-shape"]
    assert main([*words, "features", "--sweep-problems", "--out", str(tmp_path / "theory")]) == 0
    assert not (tmp_path / "theory" / "sweep.png").exists()


def test_every_job_has_a_name_of_its_own():
    plays, maps = jobs(TheoryConfig())
    assert len({job.key for job in (*plays, *maps)}) == len(plays) + len(maps)
    assert set(do(replace(plays[0], dials=DIALS, rounds=2, marks=(1, 2)))) >= {"regret", "bound", "eta", "unit"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--problems cubic", "--problems 'cubic' does not exist: choose from absolute, hinge, squares, logistic"),
        ("--problems squares squares", "each once"),
        ("--methods muon", "--methods 'muon' does not exist: choose from asgo, asgo-right, adagrad"),
        ("--rows 1", "--rows 1 is out of range: pass a number from 2 to 200"),
        ("--rows 40 --columns 40", "are 1600 entries"),
        ("--rank 9", "--rank 9 is out of range: pass a number from 1 to 8"),
        ("--rank 9 --structure both", "--rank 9 is out of range: pass a number from 1 to 8"),
        ("--sweep-ranks 0", "--sweep-ranks 0 is out of range"),
        ("--sweep-ranks 2 2", "--sweep-ranks 2 2: pass at least one number, each once"),
        ("--spread 9", "--spread 9.0 is out of range: pass a number from 1 to 8"),
        ("--spread nan", "--spread nan is out of range"),
        ("--tail 2", "--tail 2.0 is out of range: pass a number from 0 to 1"),
        ("--noise -1", "--noise -1.0 is out of range"),
        ("--noise 2", "--noise 2.0 is out of range: pass a number from 0 to 1"),
        ("--batch 0", "--batch 0 is out of range: pass a number from 1 to 100000"),
        ("--rounds 9", "--rounds 9 is out of range: pass a number from 10 or more"),
        ("--steps 0", "--steps 0.0: pass at least one number from 1e-06 to 1e+06, each once"),
        ("--steps 1e9", "--steps 1000000000.0: pass"),
        ("--steps 1 1", "each once"),
        ("--seed -1", "--seed -1 is out of range"),
        ("--processes 0", "--processes 0 is out of range"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, more, message):
    assert main(["--out", str(tmp_path / "theory"), *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "theory").exists()


def test_dials_at_their_ends_are_accepted():
    for more in ({"rank": 8, "spread": 8.0}, {"rank": 12, "structure": "right"}, {"tail": 0.0, "noise": 1.0}):
        check(replace(TheoryConfig(), **more))
    check(replace(TheoryConfig(), problems=("squares",), sweep_problems=(), noise=5.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_widest_steps_overflow_nothing(problem, method):
    noise = 1.0 if problem == "hinge" else 1e6
    seen = noted(TheoryJob(replace(DIALS, problem=problem, noise=noise), method, 30, (1e-6, 1e6), (30,)))
    wanted = ("regret", "linear", "excess", "bound", "distance", "trace")
    assert all(seen[name].isfinite().all() for name in wanted)
