"""A comparison: same weights and batches for all, every artefact, interrupted and resumed; and its arithmetic."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from scipy.stats import ttest_rel

from asgo.lab.cli import main
from asgo.lab.compare import compare as compare_module
from asgo.lab.compare import search as search_module
from asgo.lab.compare.compare import compare
from asgo.lab.compare.paired_test import all_pairs, paired_test, target_ratio
from asgo.lab.compare.summary import Outcome, cells, choose_target, summarize
from asgo.lab.compare.tune import search
from asgo.lab.config.codec import command
from asgo.lab.config.runs import CadenceConfig, CompareConfig, MachineConfig, ModelConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import LabError
from asgo.lab.figures import Curve, draw_comparison
from asgo.lab.optimizers.registry import build_optimizer
from asgo.lab.optimizers.spec import parse_entry, parse_spec
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.stopping import Stopped
from asgo.lab.training.train import Trainer


@pytest.fixture
def config(colours, tmp_path):
    return CompareConfig(
        data=DataConfig(corpus=CorpusConfig(name=str(colours)), block_size=16, batch_size=2),
        model=ModelConfig(preset="tiny", dropout=0.1),
        machine=MachineConfig(device="cpu", threads=1),
        cadence=CadenceConfig(log_every=2, eval_every=2, eval_blocks=4, checkpoint_every=4),
        steps=6,
        optimizers=("asgo", "adamw:lr=0.002"),
        seeds=(0, 1),
        out=tmp_path / "comparison",
    )


class Links(HTMLParser):
    """What a page would fetch, and how its tags nest."""

    def __init__(self):
        super().__init__()
        self.links, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_two_optimizers_two_seeds(config, capsys):
    results = compare(config, Console(width=200))
    shown = capsys.readouterr().out

    # the same seed gives every optimizer the same start, another seed another one
    starts = {}
    for text, folder in (("asgo", "asgo"), ("adamw:lr=0.002", "adamw_lr=0.002")):
        for seed in config.seeds:
            metrics = RunFolder(config.out / "runs" / folder / f"seed-{seed}").metrics()
            starts[text, seed] = metrics[0]["val_loss"]
    assert starts["asgo", 0] == starts["adamw:lr=0.002", 0]
    assert starts["asgo", 1] == starts["adamw:lr=0.002", 1]
    assert starts["asgo", 0] != starts["asgo", 1]

    names = {p.name for p in config.out.iterdir()}
    files = {"comparison.json", "results.json", "table.md", "table.csv", "plot.png", "report.html"}
    assert names == files | {"runs"}
    saved = json.loads((config.out / "results.json").read_text())
    assert [row["optimizer"] for row in saved["rows"]] == list(config.optimizers)
    finals = [run["val_loss"] for runs in results["runs"].values() for run in runs]
    assert saved["target"] == max(finals)
    for row, runs in zip(saved["rows"], results["runs"].values(), strict=True):
        losses = [run["val_loss"] for run in runs]
        assert row["val_loss"] == pytest.approx(sum(losses) / 2)
        assert row["spread"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        assert row["best"] == min(losses)
        assert row["reached"] == 2
        assert 0 < row["steps_to_target"] <= 6
        assert 0 < row["optimizer_share"] < 1
    rows = list(csv.DictReader((config.out / "table.csv").open()))
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in saved["rows"]]
    assert (config.out / "table.md").read_text().count("\n| ") == 3
    assert (config.out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "no test is possible with 2 paired" in saved["tests"][0]["text"]
    for part in ("adamw:lr=0.002", "target", str(config.out / "plot.png"), str(config.out / "report.html")):
        assert part in shown


def test_the_page_needs_nothing_but_itself(config):
    compare(replace(config, steps=2))
    text = (config.out / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert not page.open
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text
    words = " ".join(page.text)
    for part in ("adamw:lr=0.002", "asgo compare --", "asgo train --", "transformers", '"block_size": 16'):
        assert part in words


def test_an_interrupted_comparison_goes_on_where_it_was(config, tmp_path, monkeypatch):
    whole = compare(replace(config, out=tmp_path / "whole"))
    original, count = Trainer._train_step, []

    def train_step(self):
        original(self)
        count.append(self.config.optimizer.name)
        if len(count) == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        with pytest.raises(Stopped, match="finished runs are kept. Continue with: asgo compare --out .* --resume"):
            compare(config)
        assert not (config.out / "results.json").exists()
        resumed = compare(replace(config, resume=True))
        assert len(count) == 4 * 6  # no step was done twice
    for text in config.optimizers:
        for one, other in zip(whole["runs"][text], resumed["runs"][text], strict=True):
            assert one["val_loss"] == other["val_loss"]
    with pytest.raises(LabError, match="already holds a comparison: pass --resume"):
        compare(config)
    with pytest.raises(LabError, match=r"steps \(there 6, asked 7\)"):
        compare(replace(config, resume=True, steps=7))


def test_tuning_gives_each_optimizer_the_same_number_of_runs(config):
    config = replace(config, tune=2, seeds=(0,), steps=2, optimizers=("asgo", "adamw"))
    results = compare(config)
    for text in config.optimizers:
        assert len(list((config.out / "tune" / text).iterdir())) == 2
        tried = dict(results["tuning"][text]["tried"])
        assert results["tuning"][text]["lr"] == min(tried, key=tried.__getitem__)
        assert results["runs"][text][0]["seed"] == 0
    assert "tune" in (config.out / "report.html").read_text()
    assert "Learning rates" in (config.out / "report.html").read_text()


def test_a_search_gives_each_optimizer_the_same_trials_and_goes_on_where_it_was(config, monkeypatch):
    """Interrupted in its third trial it repeats no trial and ends where an uninterrupted one does; its rows repeat."""
    config = replace(
        config, search=4, seeds=(0,), steps=4, reference="adamw:steps_factor=2",
        optimizers=("muon:name=ours", "adamw:steps_factor=2"), model=replace(config.model, dropout=0.0),
    )  # fmt: skip
    whole = compare(replace(config, out=config.out.with_name("whole")))
    original, count = compare_module.run_job, []

    def run_job(job, *args):
        count.append(job.key)
        if len(count) == 3:
            raise Stopped("as after Ctrl-C")
        return original(job, *args)

    monkeypatch.setattr("asgo.lab.compare.runner.run_job", run_job)
    with pytest.raises(Stopped, match="asgo compare --out .* --resume"):
        compare(config)
    results = compare(replace(config, resume=True))
    assert results["search"] == whole["search"]
    assert [row["val_loss"] for row in results["rows"]] == [row["val_loss"] for row in whole["rows"]]
    trials = [json.loads(line) for line in (config.out / "search.jsonl").read_text().splitlines()]
    assert len(count) - 1 == len({trial["job"] for trial in trials}) + 2 == len(trials) + 2
    assert not (config.out / "search").exists()

    trials = [trial["result"] for trial in trials]
    for text, steps in (("ours", 4), ("adamw:steps_factor=2", 8)):
        own = [trial for trial in trials if trial["optimizer"] == text]
        assert [(t["stage"], t["steps"], t["seed"]) for t in own] == [
            *[("wide", steps // 4, 1000)] * 2, *[("near", steps // 4, 1000)] * 2, ("full", steps, 1000)
        ]  # fmt: skip
        best = min(own[:4], key=lambda trial: trial["val_loss"])
        assert results["search"][text]["values"] == {key: best[key] for key in search_module.WIDTHS}
        assert results["search"][text]["trials"] == 5
        for run in results["runs"][text]:
            assert run["steps"] == steps
        again = main([*shlex.split(results["again"][text])[1:], "--out", str(config.out / "again" / text[:4])])
        assert again == 0
        repeated = RunFolder(config.out / "again" / text[:4]).result()
        assert repeated["val_loss"] == results["runs"][text][0]["val_loss"]
        written = parse_spec(results["search"][text]["entry"].replace(",steps_factor=2", ""))
        assert (written.lr, written.weight_decay) == (best["lr"], best["weight_decay"])
    assert [test["second"] for test in results["tests"]] == ["adamw:steps_factor=2"]
    for what in ("steps", "seconds"):
        (ratio,) = results[f"{what}_ratios"]
        assert ratio["text"].startswith(f"{what} of adamw:steps_factor=2 / {what} of ours to the target: ")
    table, report = ((config.out / name).read_text() for name in ("table.md", "report.html"))
    for part in (
        "against adamw:steps_factor=2, by final loss with p < 0.05",
        "of 5 trials",
        "asgo train --corpus.name",
    ):
        assert part in table
    assert "The same trials for each" in report


def test_every_second_seed_has_the_optimizers_in_reverse(config, monkeypatch):
    order = []
    original = compare_module.Runner.run

    def run(self, jobs, keep):
        order.extend((job.entry, job.config.seed) for job in jobs)
        original(self, jobs, keep)

    monkeypatch.setattr(compare_module.Runner, "run", run)
    config = replace(config, seeds=(5, 6, 7), steps=2, optimizers=("muon", "adamw"))
    results = compare(config)
    assert order == [("muon", 5), ("adamw", 5), ("adamw", 6), ("muon", 6), ("muon", 7), ("adamw", 7)]
    assert [row["optimizer"] for row in results["rows"]] == ["muon", "adamw"]


@pytest.mark.slow
def test_a_comparison_of_several_processes_that_was_killed_goes_on(config):
    """A real kill -9 of all its processes; the rest is done by another number of processes."""
    config = replace(config, search=4, seeds=(0,), steps=8, optimizers=("muon", "adamw"))
    words = shlex.split(command("asgo.lab compare", replace(config, jobs=2)))
    start = {"start_new_session": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", *words], **start)
    try:
        record = config.out / "search.jsonl"
        while process.poll() is None and not (record.exists() and record.read_text().count("\n") > 1):
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = record.read_text().splitlines()
    results = compare(replace(config, resume=True))
    whole = compare(replace(config, out=config.out.with_name("whole")))
    assert record.read_text().splitlines()[:2] == before[:2]
    assert results["search"] == whole["search"]
    assert [row["val_loss"] for row in results["rows"]] == [row["val_loss"] for row in whole["rows"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": 2}, "--search 2 is too small: pass 4 trials or more"),
        ({"search": 8, "tune": 2}, "--tune and --search both choose learning rates"),
        ({"search": 8, "tune_seed": 1}, "--tune-seed 1 is also one of --seeds: hyperparameters must be chosen"),
        ({"reference": "muon"}, "--reference muon is not compared: pass one of --optimizers asgo adamw:lr=0.002"),
        ({"jobs": 0}, "--jobs 0 is out of range: pass a number of processes"),
        ({"optimizers": ("asgo:steps_factor=0",)}, "steps_factor must be above 0"),
        ({"optimizers": ("asgo:name=../a",)}, "a name has letters, digits and"),
        ({"optimizers": ("asgo:name=",)}, "a name has letters, digits and"),
        ({"optimizers": ("asgo:name=a", "muon:name=a")}, "--optimizers a a repeats an entry"),
    ],
)
def test_what_a_comparison_refuses(config, changes, message):
    with pytest.raises(LabError, match=message):
        compare(replace(config, **changes))
    assert not config.out.exists()


def test_a_diverged_run_is_counted_and_the_rest_goes_on(config, capsys):
    config = replace(config, optimizers=("adamw", "sgd:lr=1e30"), seeds=(0,), cadence=CadenceConfig(log_every=1))
    results = compare(config, Console(width=300))
    assert [row["diverged"] for row in results["rows"]] == [0, 1]
    assert results["rows"][1]["val_loss"] is None
    assert "(1 of 1 diverged)" in capsys.readouterr().out
    json.loads((config.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert compare(replace(config, resume=True))["rows"][1]["diverged"] == 1


def test_a_corpus_that_is_missing_leaves_no_folder(config):
    data = replace(config.data, corpus=CorpusConfig(name="no/such/file"))
    with pytest.raises(LabError, match="does not exist"):
        compare(replace(config, data=data))
    assert not config.out.exists()


# ---- arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [  # quantiles of printed tables of Student's t
        (4.303, 2, 0.05),
        (3.182, 3, 0.05),
        (2.571, 5, 0.05),
        (2.228, 10, 0.05),
        (9.925, 2, 0.01),
        (3.355, 8, 0.01),
    ],
)
def test_p_is_that_of_the_tables(t, freedom, p):
    """Differences with the mean t and the standard error 1 have the statistic t."""
    spaced = torch.linspace(-1, 1, freedom + 1, dtype=torch.float64)
    differences = (spaced / spaced.std() * math.sqrt(freedom + 1) + t).tolist()
    for sign in (1, -1):
        test = paired_test("a", "b", [(sign * difference, 0.0) for difference in differences])
        assert test.t == pytest.approx(sign * t)
        assert test.p == pytest.approx(p, rel=2e-3)


def test_paired_test():
    test = paired_test("a", "b", [(1.0, 2.0), (2.0, 2.5), (3.0, 4.5)])
    assert test.difference == pytest.approx(-1.0)
    assert test.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert test.t == pytest.approx(-2 * math.sqrt(3))
    assert test.p == pytest.approx(0.0742, abs=1e-4)
    assert str(test) == "a - b: -1.0000, standard error 0.2887 (3 paired seeds, t = -3.46, p = 0.0742)"
    assert "no test is possible with 2" in str(paired_test("a", "b", [(1, 2), (1, 3)]))
    assert "without spread" in str(paired_test("a", "b", [(1, 2)] * 3))
    assert "no seed that both finished" in str(paired_test("a", "b", []))
    (only,) = all_pairs({"a": {0: 1.0, 1: 2.0}, "b": {1: 1.0, 2: 9.0}})
    assert (only.seeds, only.difference) == (1, 1.0)


@pytest.mark.parametrize("best", [-5.0, -2.0, -0.5, 0.0, 1.5, 4.0])
@pytest.mark.parametrize("budget", [1, 3, 5, 8])
def test_search_spends_its_budget_and_walks_to_the_best(best, budget):
    calls = []

    def loss(lr):
        calls.append(lr)
        return (math.log2(lr / 0.01) - best) ** 2

    found = search(0.01, budget, loss)
    assert len(calls) == len(set(calls)) == budget
    assert [lr for lr, _ in found.tried] == calls
    assert loss(found.lr) == min(value for _, value in found.tried)
    if budget == 8:
        assert abs(math.log2(found.lr / 0.01) - best) <= 0.5
        assert found.bracketed


def test_search_walks_away_from_divergence():
    found = search(1.0, 5, lambda lr: math.nan if lr > 0.3 else 1 / lr)
    assert [lr for lr, _ in found.tried] == [1.0, 0.5, 0.25, 0.125, 0.25 * math.sqrt(2)]
    assert found.lr == 0.25
    assert found.bracketed


@pytest.mark.parametrize("name", ["asgo", "muon", "adamw", "soap", "torch-muon", "sgd"])
@pytest.mark.parametrize("best", [0.5, 1.0, 2.0, 1e3])
def test_a_search_comes_near_the_best_and_says_where_it_may_lie_beyond(name, best):
    """Of a loss that is smallest at `best` times the middle of every range."""
    entry, budget = parse_entry(name), 64
    middle = search_module.centre(entry)
    assert ("weight_decay" in middle) == (name != "sgd")
    assert (middle["momentum"], middle["adamw_lr"]) == (0.9, parse_spec("adamw").lr)

    def distances(values):
        odds = {key: 1 - value if key == "momentum" else value for key, value in values.items()}
        base = {key: 1 - value if key == "momentum" else value for key, value in middle.items()}
        return {key: math.log(odds[key] / base[key] / best) for key in odds}

    losses, trials = {}, search_module.wide(entry, budget)
    for stage in search_module.STAGES:
        trials += search_module.next_trials(stage, entry.name, budget, losses, trials)
        losses |= {t.key: sum(d * d for d in distances(t.values).values()) for t in trials}
    counts = [sum(trial.stage == stage for trial in trials) for stage in search_module.STAGES]
    assert counts == [32, 32, 16]
    assert search_module.share(budget) == 64 / 4 + 16
    found = search_module.conclude(losses, trials)
    assert found.val_loss == min(losses.values())
    if best < 3:
        assert all(abs(distance) < math.log(2) for distance in distances(found.values).values())
        assert not found.edges
    else:
        assert set(found.edges) & {"lr", "adamw_lr"}
    config = search_module.configured(entry.optimizer, found.values)
    build_optimizer(torch.nn.Linear(3, 2), config)
    assert config.lr == found.values["lr"]
    if name in ("muon", "torch-muon", "sgd"):
        assert config.options[-1] == f"momentum={found.values['momentum']:g}"
    else:
        assert config.betas == (found.values["momentum"], {"asgo": 0.2, "adamw": 0.95, "soap": 0.95}[name])


def test_what_is_written_is_the_middle_of_a_search_and_zero_stays_zero():
    middle = search_module.centre(parse_entry("asgo:lr=1e-4,weight_decay=0"))
    assert middle == {"lr": 1e-4, "momentum": 0.9, "adamw_lr": 1e-4}
    assert search_module.centre(parse_entry("muon:adamw_lr=3e-5"))["adamw_lr"] == 3e-5


def test_steps_to_a_loss_are_compared_by_their_ratio():
    """Against scipy's own paired test, on logarithms."""
    ours, theirs = [80.0, 90.0, 85.0, 70.0], [100.0, 120.0, 90.0, 95.0]
    found = target_ratio("steps", "a", "b", list(zip(ours, theirs, strict=True)))
    logs = [[math.log(x) for x in some] for some in (theirs, ours)]
    expected = ttest_rel(*logs)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert found.ratio == pytest.approx(math.prod(b / a for a, b in zip(ours, theirs, strict=True)) ** 0.25)
    assert "steps of b / steps of a to the target: 1.2" in str(found)
    assert "not reached by both on 1 of 2 seeds" in str(target_ratio("steps", "a", "b", [(None, 3.0), (1.0, 2.0)]))
    assert "1.500, no test" in str(target_ratio("steps", "a", "b", [(2.0, 3.0)]))
    assert "no seed" in str(target_ratio("steps", "a", "b", []))
    curve = Curve((0, 10, 20, 30), (0.0, 2.0, 4.0, 8.0), (4.0, 3.0, 3.5, 1.5))
    crossed = [curve.crosses(x) for x in (5.0, 3.5, 3.0, 2.5, 1.0)]
    assert crossed == [(10, 2.0), (5.0, 1.0), (10.0, 2.0), (25.0, 6.0), None]


def test_verdicts():
    """By the sign of the difference, where it is told apart."""
    noise = [0.01, -0.01, 0.02, -0.02]
    pairs = [(1.0 + x, 2.0) for x in noise], [(2.0 + x, 1.0) for x in noise], [(1.0 + x, 1.0) for x in noise]
    assert [paired_test("a", "b", some).verdict for some in pairs] == ["win", "loss", "tie"]
    assert paired_test("a", "b", [(1.0, 2.0)]).verdict == "-"
    expected = ttest_rel(*zip(*pairs[0], strict=True)).confidence_interval(0.95)
    test = paired_test("a", "b", pairs[0])
    assert (test.low, test.high) == pytest.approx((expected.low, expected.high))
    some = {name: {0: 1.0, 1: 2.0} for name in "abc"}
    assert [(t.first, t.second) for t in all_pairs(some, "b")] == [("a", "b"), ("c", "b")]


def outcome(losses, seed=0, status="finished"):
    steps = tuple(10 * i for i in range(len(losses)))
    result = {"status": status, "val_loss": losses[-1], "seconds_per_step": 0.1, "optimizer_share": 0.5}
    result |= {"failed_roots": 1, "state_bytes": 2_000_000}
    return Outcome(seed, result, Curve(steps, tuple(0.5 * step for step in steps), tuple(losses)))


def test_rows_of_the_table():
    runs = [outcome([4.0, 2.0, 1.0]), outcome([4.0, 3.0, 2.0]), outcome([4.0, 9.0], status="diverged")]
    assert choose_target("auto", {"a": runs}) == 2.0
    assert choose_target("1.5", {"a": runs}) == 1.5
    assert choose_target("auto", {"a": runs[2:]}) is None
    assert choose_target("auto", {"a": runs, "b": runs[:1]}, "b") == 1.0
    row = summarize("a", 0.01, runs, 2.0)
    assert (row.val_loss, row.best, row.runs, row.diverged) == (1.5, 1.0, 3, 1)
    assert (row.reached, row.steps_to_target, row.seconds_to_target) == (2, 15, 7.5)
    assert row.failed_roots == 2
    expected = ("a", "0.01", "1.5000 ± 0.7071 (1 of 3 diverged)", "1.0000", "15 (2 of 3 runs)")
    assert cells(row)[:5] == expected
    assert cells(row)[6:] == ("100.0", "50 %", "2", "2.00")
    nothing = summarize("b", 0.01, runs[2:], None)
    assert cells(nothing)[2:5] == ("- (1 of 1 diverged)", "-", "-")


def test_plot_of_nothing_and_of_many():
    assert draw_comparison({"a": []}, None).startswith(b"\x89PNG")
    curve = Curve((0, 1, 2), (0.0, 0.1, 0.2), (4.0, 3.0, 2.0))
    assert draw_comparison({str(i): [curve, curve] for i in range(9)}, 2.5).startswith(b"\x89PNG")
    assert draw_comparison({f"asgo:rules={'long/' * 60}rules.json": [curve]}, 2.5).startswith(b"\x89PNG")


def test_specs():
    spec = parse_spec("asgo:lr=0.02,betas=0.9/0.99,adamw_lr=1e-3,nesterov=False,statistic=gradient")
    assert (spec.name, spec.lr, spec.betas, spec.adamw_lr) == ("asgo", 0.02, (0.9, 0.99), 1e-3)
    assert spec.options == ("nesterov=False", "statistic=gradient")
    assert parse_spec("adamw").lr == parse_spec("adamw").adamw_lr
    assert compare_module._slug("adamw:lr=0.1,betas=0.9/0.95") == "adamw_lr=0.1_betas=0.9_0.95"
