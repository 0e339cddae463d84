"""The benchmark for a GPU, rehearsed on a CPU: it produces every row, survives failures, loses nothing when killed."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asgo import ASGO, report, route
from asgo.linalg.inverse_root import ROOTS, products
from asgo.linalg.polar import PLANS
from asgo.structures import SquareRoot
from benchmarks.gpu import check_graphs, check_processes, check_roots, check_steps, shapes
from benchmarks.gpu.__main__ import arguments
from benchmarks.gpu.check_graphs import GRAPHS, MODES
from benchmarks.gpu.check_processes import WAYS
from benchmarks.gpu.device import PRECISIONS, Device
from benchmarks.gpu.forms import FORMS, PRESETS, SQUARE_ROOT, STATED
from benchmarks.gpu.loss import CONTENDERS, split
from benchmarks.gpu.matrices import CONDITION, cases, gentle
from benchmarks.gpu.model import TINY, make_model
from benchmarks.gpu.part import CheckError, Part
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.peers import MUON, PEERS
from benchmarks.gpu.record import FILE, Record, read_rows
from benchmarks.gpu.results import latest, write_results
from benchmarks.gpu.roots import NAMES, UPDATE, auto_table, choices
from benchmarks.gpu.shapes import MODELS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


MODULE = ("-m", "benchmarks.gpu")


def command(*words, program=MODULE):
    return [sys.executable, *program, *map(str, words)]


def ran(*words, program=MODULE):
    line = command(*words, program=program)
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal")
    status, text = ran("--rehearse", "--out", out)
    assert status == 0, text[-5000:]
    return out, text


def rows_of(folder, part):
    return {row["row"]: row for row in latest(read_rows(folder / FILE)) if row["part"] == part}


def part_on(folder, name, **options):
    return Part(Device.pick("cpu"), Record(folder / FILE, name), 600.0, tiny=True, **options)


# ---- the rehearsal ------------------------------------------------------------------------------------------------


def test_every_part_produces_its_rows(rehearsal):
    out, _ = rehearsal
    found = {part: rows_of(out, part) for part in PARTS}
    correct = {f"root {name}{products}" for name in ROOTS for products in ("", ", loose products")}
    correct |= {f"step {preset.name}" for preset in PRESETS} | {f"step form {form.name}" for form in FORMS}
    correct |= {f"waits: {preset.name}" for preset in PRESETS} | {f"waits: form {form.name}" for form in FORMS}
    correct |= {f"step {dtype} parameters{packed}" for dtype in ("bfloat16", "float16") for packed in ("", ", packed")}
    correct |= {f"graph{name}, capture mode {mode}" for mode in MODES for name in GRAPHS}
    correct |= {f"square root {precision}" for precision in SQUARE_ROOT}
    correct |= {f"processes: {way}{root}" for way in WAYS for root in check_processes.ROOTS}
    correct |= {"step retry of a failed root", "step gradients of any size"}
    assert correct <= {name for name, row in found["correctness"].items() if row["status"] == "ok"}
    assert any(name.startswith("tests: ") for name in found["correctness"])
    names = [*(form.name for form in FORMS), *(peer.name for peer in PEERS), MUON, "products"]
    assert {f"{model}: {name}" for model in MODELS for name in names} <= set(found["speed"])
    assert all(row["seconds"] > 0 for row in found["speed"].values() if "to_muon" in row)
    launched = {row["row"] for row in found["launches"].values() if row["status"] == "ok" and row["launches"]}
    assert {f"GPT-2 124M: {form.name}" for form in FORMS if not form.waits} | {f"GPT-2 124M: {MUON}"} <= launched
    timed = {row["name"] for row in found["roots"].values() if row["status"] == "ok"}
    assert {*NAMES, "eigh64", "Cholesky", UPDATE} == timed
    curves = [row for row in found["loss"].values() if row["status"] == "point"]
    assert {row["optimizer"] for row in curves} == set(CONTENDERS)
    assert all(math.isfinite(row["held_out"]) and row["seconds"] > 0 for row in curves)


def test_the_results_are_tables_a_picture_and_data(rehearsal):
    out, text = rehearsal
    results = json.loads((out / "results.json").read_text())
    assert results["machine"]["packages"]["torch"] == torch.__version__
    assert results["machine"]["device"].startswith("CPU")
    assert {choice["name"] for choice in results["auto"]} <= {"eigh", "minimax"}
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    tables = (out / "table.md").read_text()
    assert tables in text
    for title in ("Correctness", "Rate of square products", "Speed of a step", "Roots", "Loss of GPT-2", "`auto`"):
        assert f"## {title}" in tables


def test_the_commands_of_the_page_parse_and_every_part_is_on_it():
    page = (ROOT / "docs" / "gpu.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert arguments(shlex.split(line)[3:]).out
    written = {name: float(seconds) for name, seconds in re.findall(r"^\| `(\w+)` \| (\d+)", page, re.MULTILINE)}
    assert written == arguments(["--out", "nowhere"]).budget
    assert sum(written.values()) <= 480


# ---- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_with_its_traceback_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(A, eps):
        raise RuntimeError("broken on purpose")

    monkeypatch.setitem(ROOTS, "eigh", replace(ROOTS["eigh"], solve=broken))
    check_roots.run(part_on(tmp_path, "correctness"))
    rows = rows_of(tmp_path, "correctness")
    failed = [name for name, row in rows.items() if row["status"] == "failed"]
    assert failed == ["root eigh", "root eigh, loose products"]
    assert re.search(r"in broken\n.*RuntimeError: broken on purpose", rows["root eigh"]["traceback"], re.DOTALL)
    assert sum(row["status"] == "ok" for row in rows.values()) == 2 * len(ROOTS) - 2 + 2 * len(SQUARE_ROOT)
    table = write_results(tmp_path, picture=False)
    assert re.search(r"\| correctness \| root eigh +\| failed \| RuntimeError: broken on purpose \|", table)


DIES = """
import os, signal, sys
from benchmarks.gpu import __main__, roots
roots.ROOTS["minimax_fast"] = lambda A, eps: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_process_that_dies_is_recorded_and_the_rest_goes_on_in_another(tmp_path):
    words = ["--rehearse", "--out", str(tmp_path), "--parts", "roots", "--only", "*k = 8, 1"]
    done = subprocess.run(
        [sys.executable, "-c", DIES, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == 1
    rows = rows_of(tmp_path, "roots")
    died = rows.pop("minimax_fast, k = 8, 1")
    assert (died["status"], died["error"]) == ("failed", "the process ended with status -9")
    measured = {name for name, row in rows.items() if row["status"] == "ok"}
    assert {"minimax, k = 8, 1", "eigh64, k = 8, 1", "Cholesky, k = 8, 1"} <= measured


def test_a_killed_run_leaves_readable_results_and_no_process(tmp_path):
    words = ("--rehearse", "--start", "spawn", "--parts", "correctness", "--out", tmp_path)
    process = subprocess.Popen(command(*words), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    file, end = tmp_path / FILE, time.monotonic() + 600
    while len([row for row in read_rows(file) if row["status"] == "ok"]) < 3:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # the child looks for its parent five times a second
    size = file.stat().st_size
    time.sleep(1.0)
    assert file.stat().st_size == size
    with file.open("a") as cut_off:
        cut_off.write('{"part": "correctness", "row": "half a li')
    known = rows_of(tmp_path, "correctness")
    assert sum(row["status"] == "ok" for row in known.values()) >= 3
    assert "Correctness: what passed" in write_results(tmp_path, picture=False)

    part = part_on(tmp_path, "correctness")
    before = len(read_rows(file))
    done = next(name for name, row in known.items() if row["status"] == "ok")
    assert part.attempt(done, lambda: pytest.fail("it is known")) is not None
    assert part.attempt("one more", lambda: {"value": 1})["value"] == 1
    assert len(read_rows(file)) == before + 2  # it started, and it is done: neither is lost in the half line


def test_a_record_is_not_written_over(tmp_path, capsys):
    Record(tmp_path / FILE, "roots").write("a row", "ok", {})
    with pytest.raises(SystemExit):
        arguments(["--out", str(tmp_path)])
    assert re.search(
        r"holds a record: pass another --out, --resume to go on with it, or --tables", capsys.readouterr().err
    )
    assert arguments(["--out", str(tmp_path), "--resume"]).resume
    with pytest.raises(SystemExit):
        arguments(["--budget", "speed"])
    assert "--budget speed: write a part and its seconds, e.g. speed=60" in capsys.readouterr().err


def test_rows_for_which_no_time_is_left_are_skipped_and_tried_again(tmp_path):
    part = part_on(tmp_path, "roots")
    part.seconds = 0.0
    assert part.attempt("late", lambda: pytest.fail("there is no time")) is None
    assert rows_of(tmp_path, "roots")["late"]["status"] == "skipped"
    assert part_on(tmp_path, "roots").attempt("late", dict)["status"] == "ok"


# ---- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.51}, {"weight_decay": 0.2}, {"betas": (0.95, 0.9), "nesterov": False}], ids=str
)
def test_a_wrong_step_is_outside_its_bound(tmp_path, wrong):
    """On the device, that is, while the CPU takes the right one in float64."""

    def make(groups):
        is_wide = groups[0]["params"][0][1].dtype == torch.float64
        return ASGO(groups, **{"lr": 0.5, "root": "minimax", **({} if is_wide else wrong)})

    allowed = check_steps.Allowed(0.0, 21)
    with pytest.raises(CheckError, match=r"^the distance of '\w+' from float64 is \S+, its bound \S+$"):
        check_steps.compare(part_on(tmp_path, "correctness"), make, check_steps.GIVEN, allowed)


WRONG = {
    "update": ("singular value of 'gentle'", lambda state, U, ok: (2 * U, ok)),
    "root": ("S of 'gentle'", lambda state, U, ok: (state["sqrt"][:-1].mul_(1.3), (U, ok))[1]),
    "direction": ("update of 'gentle'", lambda state, U, ok: (U.roll(1, 1), ok)),
    "state": ("changes its S", lambda state, U, ok: (state["sqrt"][-1:].mul_(2), (U, ok))[1]),
    "report": ("ok is", lambda state, U, ok: (U, torch.ones_like(ok))),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("precision", SQUARE_ROOT)
def test_a_wrong_update_of_the_square_root_form_is_outside_its_bound(tmp_path, monkeypatch, precision, wrong):
    words, change = WRONG[wrong]
    right = SquareRoot.update
    monkeypatch.setattr(SquareRoot, "update", lambda self, state, *rest: change(state, *right(self, state, *rest)))
    part = part_on(tmp_path, "correctness", only=["square root *"])
    check_roots.run(part)
    row = rows_of(tmp_path, "correctness")[f"square root {precision}"]
    assert row["status"] == "failed"
    assert words in row["error"]


@pytest.mark.parametrize("old", ["lr", "gradients"])
def test_a_graph_that_sees_no_new_lr_or_gradients_is_outside_its_bound(tmp_path, monkeypatch, old):
    """The one that is captured keeps those of the capture."""

    def capture(self, act, warm, mode):
        for _ in range(warm):
            act()
        optimizer = act.__self__
        params = [p for group in optimizer.param_groups for p in group["params"]]
        rates, grads = optimizer.param_groups[0]["lr"].clone(), [p.grad.clone() for p in params if p.grad is not None]

        def replay():
            if old == "lr":
                optimizer.param_groups[0]["lr"].copy_(rates)
            else:
                for p, grad in zip((p for p in params if p.grad is not None), grads, strict=True):
                    p.grad.copy_(grad)
            act()

        return replay

    monkeypatch.setattr(Device, "capture", capture)
    part = part_on(tmp_path, "correctness", only=["graph*"])
    check_graphs.run(part)
    rows = rows_of(tmp_path, "correctness")
    assert {row["status"] for name, row in rows.items() if name.startswith("graph")} == {"failed"}


def test_gradients_of_the_step_check_have_the_condition_that_its_bound_takes_for_granted():
    for m, n in ((32, 64), (64, 32), (48, 48)):
        values = torch.linalg.svdvals(gentle(2, m, n, 0))
        torch.testing.assert_close(values.amax(1) ** 2 / values.amin(1) ** 2, torch.full((2,), CONDITION).double())


def test_robustness_matrices_are_what_their_names_say():
    found = {case.name: case.gram for case in cases(64)}
    assert torch.linalg.matrix_rank(found["rank 1"].double(), rtol=1e-5) == 1
    assert torch.linalg.matrix_rank(found["rank 8"].double(), rtol=1e-5) == 8
    assert found["times 1e30"].isfinite().all()
    assert (found["times 1e-30"] != 0).all()
    assert {name for name, gram in found.items() if not gram.isfinite().all()} == {"NaN", "infinite", "one NaN"}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_products_and_errors_of_a_form_are_those_of_its_root(form):
    group = form.make([{"params": [torch.zeros(2, 3, requires_grad=True)], "view": shapes.MATRIX}]).param_groups[0]
    name = group["root"]
    if name == "square_root":  # of a square matrix: its iteration on [D | S], and the new S where there is one
        square = SquareRoot(precision="bf16")
        with_root = square.root_flops(64, 64) / 64**3 + square.step_flops(64, 64) / 64**3
        alone = PLANS["bf16"].products(64, 64)
        assert form.products == round(with_root if group["betas"][1] > 0 else alone)
    elif form.products is not None:
        assert form.products == products(name, group["eps"])
    if name in STATED and form.products is not None:
        assert form.error == STATED[name]


NUMEL = {
    "GPT-2 124M": 124_439_808,
    "ResNet-50": 25_557_032,
    "Llama 3.2 1B, 4 layers": 4 * (2 * 2048**2 + 2 * 512 * 2048 + 3 * 8192 * 2048 + 2 * 2048),
    "64 experts": 64 * 3 * 1024 * 2048 + 4 * 2048**2 + 64 * 2048 + 2048,
}


@pytest.mark.parametrize("model", MODELS)
def test_models_have_the_parameters_of_their_originals(model):
    weights = MODELS[model]
    assert sum(math.prod(each.shape) for each in weights) == NUMEL.get(
        model, 64 * 6_291_456 + 4 * 2048**2 + 64 * 2048 + 2048
    )
    for each in weights:
        for view in filter(None, (each.view, each.heads)):
            assert sum(map(math.prod, view.shapes(each.shape))) == math.prod(each.shape)


@pytest.mark.parametrize("model", shapes.TINY)
def test_all_layouts_and_muon_share_the_memory_of_the_parameters(model):
    workload = shapes.Workload(shapes.TINY[model], Device.pick("cpu"))
    workload.draw(0)
    memory = {param.untyped_storage().data_ptr() for param in workload.params}
    entries = sum(param.numel() for param in workload.params)
    for layout in ("fused", "apart", "heads"):
        given = [param for group in workload.groups(layout) for _, param in group["params"]]
        assert sum(param.numel() for param in given) == entries
        assert {param.untyped_storage().data_ptr() for param in given} == memory
        assert all(param.grad is not None and param.grad.any() for param in given)
    for fused in (False, True):
        given = [*workload.matrices(fused), *workload.rest]
        assert sum(param.numel() for param in given) == entries
        assert {param.untyped_storage().data_ptr() for param in given} == memory
        assert all(param.ndim == 2 and param.grad is not None for param in workload.matrices(fused))


def test_the_matrices_of_the_training_are_those_that_route_finds():
    model = make_model(TINY, 0, torch.device("cpu"))
    names = {id(param): name for name, param in model.named_parameters()}
    matrices, rest = split(model)
    routed = [row.name for row in report(ASGO(route(model))).rows if row.view != "-"]
    assert sorted(names[id(param)] for param in matrices) == sorted(routed)
    assert len(matrices) + len(rest) == len(names)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_of_products_is_the_callers_again_afterwards(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    with Device.pick("cpu").products(precision) as dtype:
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if precision == "tf32" else "ieee")
        assert dtype == (torch.float32 if precision in ("float32", "tf32") else getattr(torch, precision))
    assert torch.backends.cuda.matmul.fp32_precision == before


# ---- which root auto should be ------------------------------------------------------------------------------------


def timed(name, k, batch, seconds, error=None):
    row = {"part": "roots", "row": f"{name} {k} {batch}", "status": "ok", "name": name, "k": k, "batch": batch}
    return {**row, "seconds": seconds, **({} if error is None else {"error": error})}


def test_auto_is_the_fastest_root_that_is_as_exact_as_it_says():
    rows = [
        *(timed("eigh", 32, batch, 1.0, 1e-2) for batch in (1, 8)),
        *(timed("minimax", 32, batch, 2.0 / batch, 1e-3) for batch in (1, 8)),
        timed("eigh", 64, 1, 9.0, 1e-2),
        timed("minimax", 64, 1, 1.0, 0.5),  # faster and wrong
        timed("minimax_fast", 64, 1, 0.5, 1e-3),  # no candidate
    ]
    assert [(c.k, c.batch, c.name, c.ahead) for c in choices(rows)] == [
        (32, 1, "eigh", 2.0), (32, 8, "minimax", 4.0), (64, 1, "eigh", 1.0),
    ]  # fmt: skip
    assert auto_table(rows).splitlines() == [
        "| k | 1 | 8 |",
        "|---:|---|---|",
        "| 32 | eigh (2.0) | minimax (4.0) |",
        "| 64 | eigh (1.0) |  |",
    ]
