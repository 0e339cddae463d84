"""The benchmarks of speed: what is timed, how, and what is written. No test depends on how long anything takes."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from rich.console import Console

from asgo import ASGO
from asgo.lab import cli
from asgo.lab.config.codec import command
from asgo.lab.errors import LabError
from asgo.linalg.inverse_root import ROOTS
from asgo.optimizer.param_groups import with_views
from benchmarks import distributed, root, step
from benchmarks.speed import race
from benchmarks.speed.accuracy import exact_steps, measure
from benchmarks.speed.command import parse, program
from benchmarks.speed.config import RootConfig, StepConfig
from benchmarks.speed.matrices import KINDS, Problem, cases
from benchmarks.speed.optimizers import BENCH_OPTIMIZERS, COLD_STEPS, BenchSpec, compilation
from benchmarks.speed.race import Entry, Sweep, make_entries, sweeps
from benchmarks.speed.timing import Spread, WorkProgress, held_bytes, peak_bytes, pick_device, ratio, seconds
from benchmarks.speed.workloads import make_workload
from oracle import damped_root

CPU = torch.device("cpu")
TINY = ("tiny-gpt2", "tiny-llama", "tiny-resnet", "tiny-olmoe")
PNG = b"\x89PNG"
MODULES = {"step": step, "root": root, "distributed": distributed}


def workload(name="tiny-gpt2", matrices_only=False, layers=None):
    work = make_workload(name, layers, matrices_only, CPU, torch.float32, seed=0)
    work.reset()
    return work


def quiet():
    return Console(quiet=True)


def sweep(work, entries, **settings):
    config = StepConfig(repeats=2, **settings)
    with WorkProgress(quiet(), "", 1) as progress:
        return Sweep(work, entries, config, progress).run()


# ---- shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_workload_holds_every_parameter_once(name):
    work = workload(name)
    shared = {id(param) for _, param in (*work.matrices, *work.rest)}
    assert {id(param) for _, param in work.rest} <= {id(param) for param in work.params}
    assert sum(p.numel() for _, p in (*work.matrices, *work.rest)) == work.numel
    assert len(shared) == len(work.matrices) + len(work.rest)
    for groups in (work.whole, work.heads):
        for group in groups:
            for (given, param), view in with_views(group):
                assert view is None or view.check(given, param.shape) is None
    storages = {param.untyped_storage().data_ptr() for param in work.params}
    assert {param.untyped_storage().data_ptr() for _, param in work.matrices} <= storages
    assert all(param.ndim == 2 for _, param in work.matrices)


def test_shapes_are_those_of_the_models():
    sizes = {"gpt2-124m": (124_439_808, 48), "llama-1b": (121_643_008, 14), "resnet-50": (25_557_032, 54)}
    for name, (numel, matrices) in sizes.items():
        work = make_workload(name, None, False, torch.device("meta"), torch.float32, 0)
        assert (work.numel, len(work.matrices)) == (numel, matrices)
    olmoe = make_workload("olmoe", None, True, torch.device("meta"), torch.float32, 0)
    assert [p.shape for _, p in olmoe.matrices].count((2048, 2048)) == 64 + 4
    assert len(olmoe.matrices) == 64 * 2 + 4 + 1
    assert "matrices only" in olmoe.about


def test_layers_and_matrices_only():
    whole, some = workload(layers=3), workload(layers=3, matrices_only=True)
    assert len(whole.matrices) == len(some.matrices) == 12
    assert whole.rest
    assert not some.rest
    assert some.numel == sum(p.numel() for _, p in whole.matrices)
    assert workload("tiny-resnet", layers=7).numel == workload("tiny-resnet").numel


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_low_rank_and_noise_reach_every_alias_and_repeat(name):
    work = workload(name)
    work.draw(3)
    work.attach()
    before = [gradient.clone() for gradient in work.gradients]
    for _, param in work.matrices:
        values = torch.linalg.svdvals(param.grad)
        assert values[0] > 1.5 * values.median()
        assert 3e-4 < param.grad.square().mean().sqrt() < 3e-3
    work.draw(4)
    assert not any(torch.equal(a, b) for a, b in zip(before, work.gradients, strict=True))
    assert all(param.grad is gradient for param, gradient in zip(work.params, work.gradients, strict=True))
    work.draw(3)
    assert all(torch.equal(a, b) for a, b in zip(before, work.gradients, strict=True))


def test_neighbouring_gradients_share_their_signal():
    work = workload(matrices_only=True)
    directions = []
    for number in (0, 1, 5):
        work.draw(number)
        directions.append(torch.linalg.svd(work.gradients[0].T)[2][0])  # the longest, of the right side, which stays
    near, far = abs(directions[0] @ directions[1]), abs(directions[0] @ directions[2])
    assert near > 0.5
    assert near > far - 0.5


# ---- contenders ----------------------------------------------------------------------------------------------


def installed(contender):
    module = contender.package.replace("-", "_")
    return importlib.util.find_spec(module) is not None


@pytest.mark.slow
@pytest.mark.parametrize("shapes", TINY)
def test_every_optimizer_runs_on_every_kind_of_shapes_or_says_why_not(shapes):
    work = workload(shapes)
    with compilation(allowed=False):
        racers = sweep(work, make_entries(tuple(BENCH_OPTIMIZERS), (1, 2)))
    for racer in racers:
        if not installed(racer.entry.spec):
            assert "is not installed: pip install 'asgo[peers]'" in racer.failure
            continue
        assert not racer.failure, racer.entry
        assert [len(turn) for turn in racer.turns] == [racer.entry.steps] * 2
        assert racer.state_bytes >= 4 * work.numel
        assert racer.worst >= 1
    assert {racer.entry.name for racer in racers} == set(BENCH_OPTIMIZERS)
    assert all(param.isfinite().all() for param in work.params)


def test_contenders_of_ours_are_what_they_say():
    work = workload()
    built = {name: BENCH_OPTIMIZERS[name].build(work, 3) for name, row in BENCH_OPTIMIZERS.items() if row.is_ours}
    assert all(isinstance(optimizer, ASGO) for optimizer in built.values())
    assert built["asgo"].defaults["precondition_frequency"] == 3
    assert built["asgo-paper"].defaults["statistic"] == "gradient"
    assert built["asgo-reference"].defaults["root"] == "reference"
    assert any("sqrt" in state for state in built.pop("asgo-square-root").state.values())
    stacks = {name: max(len(s["gram"]) for s in o.state.values() if "gram" in s) for name, o in built.items()}
    assert stacks["asgo-heads"] == 2
    assert stacks["asgo"] == 1


def test_entries_and_their_intervals():
    entries = make_entries(("asgo", "asgo-paper", "muon", "adamw"), (2, 5))
    assert [(e.name, e.interval, e.steps) for e in entries] == [
        ("asgo", 2, 2),
        ("asgo", 5, 5),
        ("asgo-paper", 2, 2),
        ("muon", 1, 1),
        ("adamw", None, 1),
    ]
    assert [str(e) for e in entries] == ["asgo every 2", "asgo every 5", "asgo-paper every 2", "muon", "adamw"]


def test_sweeps_fit_the_memory_and_each_has_the_anchors():
    work = workload()
    entries = make_entries(("po-soap", "asgo", "muon", "adamw", "asgo-paper"), (1, 2))
    assert list(sweeps(entries, work, 1e12)) == [[entries[3], entries[4], *entries[:3], entries[5]]]
    needs = {entry: entry.spec.memory(work) for entry in entries}
    groups = list(sweeps(entries, work, needs[entries[3]] + needs[entries[4]] + 2.1 * needs[entries[1]]))
    assert [[str(e) for e in group] for group in groups] == [
        ["muon", "adamw", "po-soap"],
        ["muon", "adamw", "asgo", "asgo every 2"],
        ["muon", "adamw", "asgo-paper"],
    ]
    assert list(sweeps(entries[3:4], work, 0)) == [[entries[3]]]


def test_the_memory_of_ours_is_estimated_within_a_factor_of_two():
    work = workload()
    for name in ("asgo", "adamw", "muon"):
        optimizer = BENCH_OPTIMIZERS[name].build(work, 1)
        work.attach()
        optimizer.step()
        held = held_bytes(optimizer, [*work.params, *work.gradients])
        assert held / 2 < BENCH_OPTIMIZERS[name].memory(work) < held * 2


# ---- what goes wrong -----------------------------------------------------------------------------------------


class Base(torch.optim.SGD):
    def __init__(self, work):
        super().__init__([p for _, p in work.matrices], lr=1e-3)


class Raises(Base):
    def step(self, closure=None):
        raise RuntimeError("no\n  luck")


class Idle(Base):
    def step(self, closure=None):
        pass


class Explodes(Base):
    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["params"][0].fill_(math.inf)


class Slow(Base):
    def step(self, closure=None):
        time.sleep(0.02)
        super().step()


class Greedy(Base):
    """Works in the memory of the gradients and takes them away."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for param in self.param_groups[0]["params"]:
            param.grad.mul_(3)
            param.grad = None


def add(monkeypatch, name, build):
    row = BenchSpec("torch", lambda work, interval: build(work), "every", 0, "of a test")
    monkeypatch.setitem(BENCH_OPTIMIZERS, name, row)
    return Entry(name, 1)


def refuse(work):
    raise ImportError("No module named 'shiny'", name="shiny")


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Raises, "RuntimeError: no luck"),
        (Idle, "it does not move transformer.h.0.attn.c_attn.weight"),
        (Explodes, "its parameters are no longer finite"),
        (Slow, "more than --limit 0.01"),
        (refuse, "shiny is not installed: pip install 'asgo[peers]'"),
    ],
)
def test_an_optimizer_that_fails_is_a_row_and_harms_no_other(monkeypatch, build, why):
    work = workload(matrices_only=True)
    bad = add(monkeypatch, "bad", build)
    muon, failed = sweep(work, [Entry("muon", 1), bad], limit=0.01 if build is Slow else 60.0)
    assert why in failed.failure
    assert not failed.turns
    if build is not Slow:
        assert not muon.failure
        assert len(muon.turns) == 2
    assert all(param.isfinite().all() for param in work.params)


def test_gradients_are_the_same_for_all(monkeypatch):
    """Whoever changes or takes away its gradients does so for nobody else."""
    work = workload(matrices_only=True)
    seen = {}

    class Witness(Base):
        def step(self, closure=None):
            params = self.param_groups[0]["params"]
            seen.setdefault(id(self), []).append([float(p.grad.norm()) for p in params])
            super().step()

    entries = [add(monkeypatch, name, build) for name, build in (("a", Witness), ("x", Greedy), ("b", Witness))]
    racers = sweep(work, entries)
    assert not any(racer.failure for racer in racers)
    first, second = seen.values()
    assert first == second
    assert len(first) == COLD_STEPS + 2 + 1


def test_ours_is_warm_before_its_first_turn(monkeypatch):
    work = workload(matrices_only=True)
    steps = []
    original = race.seconds
    monkeypatch.setattr(race, "seconds", lambda run, device: steps.append(0) or original(run, device))
    (racer,) = sweep(work, [Entry("asgo", 2)], warm=13)
    assert len(steps) == 13 + 2 * 2
    assert racer.warm == 13


# ---- timing --------------------------------------------------------------------------------------------------


def test_spread_and_ratio():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert ratio([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == 2.0
    assert ratio([], [1.0]) is None


def test_the_worst_step_is_that_of_the_interval_not_of_a_disturbance():
    racer = race.TimedOptimizer(Entry("asgo", 2), 12, 3)
    assert racer.worst is None
    racer.turns = [[1.0, 3.0], [1.0, 3.0], [50.0, 3.0]]
    assert racer.worst == 3.0 / 2.0
    assert median(racer.means) == 2.0


def test_seconds_leaves_the_garbage_collector_as_it_was():
    import gc

    states = []
    assert seconds(lambda: states.append(gc.isenabled()), CPU) >= 0
    assert states == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        seconds(lambda: None, CPU)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_held_bytes_counts_each_storage_once_and_not_those_of_others():
    class Holder:
        def __init__(self):
            self.slab = torch.zeros(10, 10)
            self.state = {"rows": [self.slab[0], self.slab[1]], "deep": ({"x": torch.zeros(3, dtype=torch.float64)},)}
            self.params = [shared]
            self.itself = self

    shared = torch.zeros(1000)
    assert held_bytes(Holder(), [shared]) == 400 + 24
    assert held_bytes(Holder(), []) == 400 + 24 + 4000


def test_peak_bytes_is_what_is_taken_at_once():
    def run():
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        third = torch.empty(500)
        return second, third

    assert peak_bytes(run, CPU) == 12_000


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(LabError, match="finds no GPU here"):
        pick_device("cuda")


# ---- benchmarks.step ------------------------------------------------------------------------------------------


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_bench_step(tmp_path, capsys, monkeypatch):
    add(monkeypatch, "bad", Raises)
    names = ("asgo", "asgo-heads", "asgo-reference", "adamw", "adamw-fused", "muon", "bad")
    words = f"--shapes tiny-gpt2 tiny-olmoe --optimizers {' '.join(names)} --repeats 2 --device cpu"
    assert step.main([*words.split(), "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "bad: RuntimeError: no luck" in shown
    assert "tiny-olmoe: a layer of 4 experts" in shown
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"table.md", "table.csv", "plot.png", "results.json"}
    assert (out / "plot.png").read_bytes().startswith(PNG)
    rows = read_csv(out / "table.csv")
    assert len(rows) == 2 * (2 + 2 + 5)
    for row in rows:
        assert bool(row["failure"]) == (row["optimizer"] == "bad") == (not row["seconds"])
    record = json.loads((out / "results.json").read_text())
    assert record["command"].startswith("python -m benchmarks.step --shapes tiny-gpt2 tiny-olmoe --optimizers asgo ")
    assert record["config"]["repeats"] == 2
    assert record["machine"]["threads"] == 1
    assert record["machine"]["packages"]["torch"] == torch.__version__
    assert record["workloads"]["tiny-gpt2"]["parameters"] == workload().numel
    for row in record["rows"]:
        if row["failure"]:
            continue
        label = str(Entry(row["optimizer"], row["interval"]))
        turns = record["turns"][row["shapes"]][label]
        means = [sum(turn) / len(turn) for turn in turns]
        muon = [sum(turn) / len(turn) for turn in record["turns"][row["shapes"]]["muon"]]
        assert row["seconds"] == pytest.approx(median(means))
        assert row["to_muon"] == pytest.approx(median(a / b for a, b in zip(means, muon, strict=True)))
        assert row["state_share"] == row["state_bytes"] / record["workloads"][row["shapes"]]["bytes"]
    table = (out / "table.md").read_text()
    assert table.count("## ") == 2
    assert table.count("| asgo-heads | 2 |") == 2


def test_rows_of_a_later_sweep_are_compared_with_the_anchors_of_that_sweep(tmp_path):
    config = StepConfig(
        ("tiny-gpt2",), ("muon", "asgo", "po-soap"), (1,), repeats=2, memory=1e-3, out=tmp_path / "out", device="cpu"
    )
    rows = {row.optimizer: row for row in step.bench_step(config, quiet())}
    assert list(rows) == ["muon", "asgo", "po-soap"]
    assert rows["muon"].to_muon == 1.0
    assert rows["asgo"].to_muon
    assert rows["asgo"].to_reference is None
    assert bool(rows["po-soap"].to_muon) == installed(BENCH_OPTIMIZERS["po-soap"])


def test_bfloat16_parameters(tmp_path):
    config = StepConfig(
        ("tiny-gpt2",), ("asgo", "adamw", "muon"), (2,), dtype="bfloat16", repeats=1, out=tmp_path / "out", device="cpu"
    )
    rows = step.bench_step(config, quiet())
    assert [row.failure for row in rows] == [""] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("step --shapes gpt3", "--shapes gpt3 does not exist: choose from gpt2-124m"),
        ("step --optimizers asgo adam", "--optimizers adam does not exist: choose from asgo"),
        ("step --optimizers asgo asgo", "--optimizers asgo asgo repeats an entry"),
        ("step --shapes", "--shapes"),
        ("step --intervals 0", "--intervals 0 is out of range: pass numbers of steps, from 1"),
        ("step --repeats 0", "--repeats 0 is out of range"),
        ("step --warm 9", "--warm 9 is out of range: pass a number of steps, from 10"),
        ("step --layers 0", "--layers 0 is out of range"),
        ("step --limit 0", "--limit 0.0 is out of range"),
        ("step --threads 0", "--threads 0 is out of range"),
        ("step --dtype float16", "--dtype"),
        ("step --out {file}", "is a file: pass a folder"),
        ("step --out {full}", "is not empty, and nothing is overwritten"),
        ("root --roots cholesky", "--roots cholesky does not exist: choose from auto"),
        ("root --matrices toeplitz", "--matrices toeplitz does not exist: choose from signal"),
        ("root --sizes 0", "--sizes 0 is out of range"),
        ("root --eps 2", "--eps 2.0 is out of range"),
        ("root --out {full}", "is not empty, and nothing is overwritten"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    name, *words = words.format(file=tmp_path / "file", full=tmp_path / "full").split()
    given = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert MODULES[name].main([*words, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asgo: error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.txt"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("step", StepConfig()),
        ("step", StepConfig(("olmoe",), ("asgo", "muon"), (1, 4), 2, True, compile_peers=False, memory=3.5)),
        ("root", RootConfig()),
        ("root", RootConfig(("eigh", "auto"), (16,), (2, 3), ("real",), 1e-5, threads=2)),
    ],
)
def test_a_config_and_its_command_say_the_same(name, config):
    words = command(program(name), config).split()
    assert words[:3] == ["python", "-m", f"benchmarks.{name}"]
    assert parse(name, type(config), words[3:]) == config


def test_help(capsys):
    for name, module in MODULES.items():
        assert module.main(["--help"]) == 0
        assert f"usage: python -m benchmarks.{name}" in capsys.readouterr().out


def test_the_former_command_says_the_present_one(capsys):
    for words, run in (("step --shapes gpt2-124m", "step --shapes gpt2-124m"), ("root", "root"), ("", "NAME")):
        assert cli.main(["bench", *words.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"in a clone of it run python -m benchmarks.{run}.")


# ---- benchmarks.root ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_statistics(kind):
    problem = KINDS[kind](16, CPU, 0, 2)
    assert problem.size == 16
    assert len(problem.grams) == len(problem.directions)
    assert all(direction.shape[0] == 16 for direction in problem.directions)
    assert torch.allclose(problem.grams, problem.grams.mT, atol=1e-6 * float(problem.grams.abs().max()))
    values = torch.linalg.eigvalsh(problem.grams.double())
    assert (values[:, 0] > -1e-6 * values[:, -1]).all()
    again = KINDS[kind](16, CPU, 0, 2)
    assert torch.equal(problem.grams, again.grams)
    ranks = {"signal": 16, "identity": 16, "first": 2}
    if kind in ranks:
        assert (values > 1e-6 * values[:, -1:]).sum(1).tolist() == [ranks[kind]] * 4 or kind == "signal"


def test_real_matrices_are_all_sides_of_that_length():
    problem = KINDS["real"](16, CPU, 0, 1)
    # two layers, each with query, key, value, projection (16 x 16) and two matrices of the MLP (16 x 64)
    assert sorted(direction.shape[1] for direction in problem.directions) == [16] * 8 + [64] * 4


def test_a_batch_repeats_or_cuts():
    problem = Problem(torch.arange(2.0)[:, None, None] * torch.eye(3), (torch.eye(3), torch.eye(3)))
    assert problem.batch(5)[:, 0, 0].tolist() == [0, 1, 0, 1, 0]
    assert problem.batch(1)[:, 0, 0].tolist() == [0]


def test_exact_steps_are_those_of_the_oracle():
    problem = KINDS["signal"](12, CPU, 0, 0)
    for gram, direction, exact in zip(problem.grams, problem.directions, exact_steps(problem, 1e-3), strict=True):
        wanted = damped_root(gram.double().numpy(), 1e-3) @ direction.double().numpy()
        assert torch.allclose(exact, torch.from_numpy(wanted), rtol=1e-9)


def test_errors_of_roots_with_a_known_error(monkeypatch):
    problem = KINDS["signal"](12, CPU, 0, 0)
    exact = exact_steps(problem, 1e-3)

    def off(A, eps):
        Z, ok = ROOTS["eigh64"](A, eps)
        return Z * torch.tensor([1.0, 1.1, 0.9, -1.0])[:, None, None], ok

    monkeypatch.setitem(ROOTS, "off", off)
    found = measure("off", problem, 1e-3, exact)
    assert found.max_error == pytest.approx(2.0, rel=1e-4)
    assert found.median_error == pytest.approx(0.1, rel=1e-3)
    assert found.min_cos == pytest.approx(-1.0, rel=1e-4)
    assert found.finite
    assert found.told
    assert measure("eigh64", problem, 1e-3, exact).max_error < 1e-5
    theory = measure("outside", problem, 1e-3, exact_steps(problem, 1e-3, ROOTS["outside"].formula))
    assert theory.max_error < 1e-5


def test_cases_find_what_is_wrong():
    problems = {case.name: case.problem for case in cases(CPU, 0)}
    assert len(problems) == 12
    scaled = [problems[f"gradient x {factor:g}"] for factor in (1.0, 1e15)]
    errors = [measure("eigh64", p, 1e-6, exact_steps(p, 1e-6)).max_error for p in scaled]
    assert errors[1] == pytest.approx(errors[0], rel=1)
    for name in ("one NaN matrix of 4", "one infinite matrix of 4", "one zero matrix of 4"):
        exact = exact_steps(problems[name], 1e-6)
        good, bad = (measure(root, problems[name], 1e-6, exact) for root in ("eigh64", "reference"))
        assert good.finite
        assert good.told
        assert good.max_error < 1e-3
        assert not bad.told or bad.max_error == math.inf


@pytest.mark.slow
def test_bench_root(tmp_path, capsys):
    words = "--sizes 8 16 --batches 1 3 --repeats 2 --real-steps 1 --device cpu --threads 1"
    assert root.main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for title in ("signal, 3 at once, 1 CPU thread", "Robustness"):
        assert title in shown
    out = tmp_path / "out"
    names = {"table.md", "table.csv", "robustness.csv", "plot.png", "results.json"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "plot.png").read_bytes().startswith(PNG)
    rows = read_csv(out / "table.csv")
    taken = {name for name, kind in ROOTS.items() if kind.min_eps <= 1e-6}
    assert len(rows) == 2 * 2 * len(KINDS) * len(taken)
    assert {row["root"] for row in rows} == taken
    assert not any(row["failure"] for row in rows)
    assert "| minimax_tf32 | root 'minimax_tf32' got eps=1e-06: its products" in (out / "table.md").read_text()
    assert all(float(row["products"]) > 0 and float(row["speedup"]) > 0 for row in rows)
    assert all(float(row["speedup"]) == 1 for row in rows if row["root"] == "reference")
    small = [float(row["max_error"]) for row in rows if row["root"] == "eigh64"]
    assert max(small) < 1e-3
    record = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert record["command"].startswith("python -m benchmarks.root --sizes 8 16 --batches 1 3")
    assert len(record["table"]) == len(rows)
    assert len(record["robustness"]) == 12 * len(taken)


def test_roots_that_all_refuse_the_damping_are_an_error(tmp_path):
    with pytest.raises(LabError, match=r"^--roots minimax_tf32: none can work with --eps 1e-06: pass a larger"):
        root.bench_root(RootConfig(("minimax_tf32",), (8,), (1,), out=tmp_path / "out", device="cpu"), quiet())
    assert not (tmp_path / "out").exists()


def test_a_root_that_raises_is_a_row(tmp_path, monkeypatch):
    def broken(A, eps):
        raise ValueError("no such\nluck")

    monkeypatch.setitem(ROOTS, "broken", replace(ROOTS["eigh64"], solve=broken))
    config = RootConfig(("eigh", "broken"), (8,), (1,), ("identity",), repeats=1, out=tmp_path / "out", device="cpu")
    good, bad = root.bench_root(config, quiet())
    assert (good.failure, bad.failure) == ("", "ValueError: no such luck")
    assert good.speedup is None  # the released root was not timed


def test_the_extra_installs_the_peers():
    extra = (Path(__file__).parents[2] / "pyproject.toml").read_text().split("peers = [")[1].split("]")[0]
    packages = {contender.package for contender in BENCH_OPTIMIZERS.values()} - {"asgo", "torch"}
    assert {line.strip(' "\n').split(">=")[0] for line in extra.split(",\n") if line.strip()} == packages
