"""``asgo regret``: its examples, its losses against plain numpy, its best fixed weights, its answer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from asgo.lab.compare.paired_test import paired_test
from experiments.regret import experiment as module
from experiments.regret.__main__ import main
from experiments.regret.experiment import FEATURES, RegretJob, examples, hindsight, marks, play, view

JOB = RegretJob(blocks=2, repeats=3, rounds=130, lr=0.01, eps=1e-8, seed=4)


def stream(job):
    """All features ``(rounds, repeats, 100)`` and labels of a job."""
    x, y = zip(*examples(job), strict=True)
    return torch.stack(x).numpy(), torch.stack(y).numpy()


def test_examples_have_the_papers_moments():
    x, y = stream(replace(JOB, repeats=20, rounds=300))
    assert x.shape == (300, 20, FEATURES)
    assert set(np.unique(y)) == {-1.0, 1.0}
    assert abs(y.mean()) < 0.05
    first, second = (x * y[:, :, None])[..., :50], (x * y[:, :, None])[..., 50:]
    for half, share, mean, spread in ((first, 0.5, 10, 10), (second, 0.4, -5, 5)):
        there = half[half != 0]
        assert (half != 0).mean() == pytest.approx(share, abs=0.005)
        assert there.mean() == pytest.approx(mean, abs=0.15)
        assert there.std() == pytest.approx(spread, rel=0.02)


def test_a_shorter_run_sees_the_same_examples_and_another_seed_others():
    long, short = stream(JOB)[0], stream(replace(JOB, rounds=20))[0]
    np.testing.assert_array_equal(long[:20], short)
    assert not np.array_equal(stream(replace(JOB, seed=5))[0], long)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 100])
def test_losses_are_those_of_the_formula(blocks):
    x, y = stream(JOB)
    groups = np.array_split(np.arange(FEATURES), blocks)
    expected = []
    for r in range(JOB.repeats):
        weights, squares, total, seen = np.zeros(FEATURES), np.zeros(blocks), 0.0, []
        for features, label in zip(x[:, r], y[:, r], strict=True):
            loss = max(0.0, 1 - label * weights @ features)
            grad = -label * features * (loss > 0)
            for b, group in enumerate(groups):
                squares[b] += (grad[group] ** 2).mean()
                weights[group] -= JOB.lr * grad[group] / (np.sqrt(squares[b]) + JOB.eps)
            total += loss
            seen.append(total)
        expected.append(seen)
    at = np.array(marks(JOB.rounds)) - 1
    np.testing.assert_allclose(play(replace(JOB, blocks=blocks)), np.array(expected).T[at], rtol=1e-9)


@pytest.mark.parametrize("blocks", [1, 3, 4, 100])
def test_views_have_a_matrix_for_every_block(blocks):
    shapes = view(blocks).shapes((5, FEATURES))
    assert sum(b for b, _, _ in shapes) == 5 * blocks
    assert sum(b * m * n for b, m, n in shapes) == 5 * FEATURES


def test_marks_end_with_the_last_round():
    assert marks(1) == [1]
    assert marks(25) == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25]


def test_hindsight_is_zero_where_weights_separate():
    assert hindsight(replace(JOB, blocks=0)) == [[0.0, 0.0, 0.0]]


def test_hindsight_by_a_linear_programme(monkeypatch):
    pytest.importorskip("scipy")
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    y = np.array([1.0, 1.0, -1.0, -1.0])
    # the first column is worth 1 - w, 1 - w and 1 + w: the best is w = 1, at a loss of 2
    assert module._programme(x, y) == pytest.approx(2)

    def flipped(job):
        """The labels of the second stream are those of no half-space."""
        random = torch.Generator().manual_seed(0)
        for features, labels in examples(job):
            other = torch.where(torch.rand(len(labels), generator=random) < 0.5, -labels, labels)
            yield features, torch.where(torch.arange(len(labels)) == 1, other, labels)

    monkeypatch.setattr(module, "examples", flipped)
    job = replace(JOB, blocks=0, rounds=400)
    ((first, second, third),) = hindsight(job)
    assert first == third == 0
    x, y = module._stream(job, 1)
    zero, played = float(len(y)), play(replace(job, blocks=1))[-1][1]
    assert 0 < second <= min(zero, played)


def test_the_answer_follows_from_the_numbers():
    noise = [0.01 * (-1) ** i for i in range(10)]
    final = {1: 5.0, 2: 1.0, 3: 3.0, 4: 1.1, 100: 4.0}
    values = {blocks: [mean + e * blocks % 0.07 for e in noise] for blocks, mean in final.items()}
    paper = [module._test(values, *pair) for pair in module.PAPER]
    said = module._answer(paper)
    assert "holds; shown by a paired t-test at 5 %: B=2 below B=3, B=4 below B=3, B=3 below B=100" in said
    worse = [*paper, paired_test("B=7", "B=8", [(2.0, 1.0), (3.0, 1.0), (2.5, 1.0)])]
    assert "does not hold" in module._answer(worse)
    assert "the other way round: B=7 below B=8" in module._answer(worse)
    assert "nothing to judge" in module._answer([])


def test_the_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "regret"
    words = ["--rounds", "60", "--repeats", "5", "--processes", "1", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "lowest to highest: B = " in shown
    assert "the paper's order" in shown
    results = json.loads((out / "results.json").read_text())
    assert [row["blocks"] for row in results["rows"]] == [1, 2, 3, 4, 100]
    assert all(len(values) == 5 for values in results["final"].values())
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(RegretJob, "run", None)
    assert main(["--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--blocks 0 2", "--blocks 0 2: pass at least one number from 1 to 100, each once"),
        ("--blocks 101", "from 1 to 100"),
        ("--blocks 2 2", "each once"),
        ("--rounds 0", "--rounds 0 is out of range"),
        ("--eps 0", "--lr and --eps must be above 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, more, message):
    assert main(["--out", str(tmp_path / "regret"), *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "regret").exists()
