"""The Hessian of a language model: products against autograd, answers where they are known, its folder, its errors."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

pytest.importorskip("curvlinops")

from asgo.lab.cli import main as asgo
from asgo.lab.config.runs import ModelConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import LabError
from asgo.lab.models.language import build_model
from asgo.lab.training.stopping import Stopped
from experiments.hessian import curvature as products_module
from experiments.hessian import measure
from experiments.hessian.__main__ import main
from experiments.hessian.curvature import Logits, NotMeasurable, Products, check_loss
from experiments.hessian.matrices import find_matrices
from experiments.hessian.measure import Measure, Point, Training, blocks, build
from experiments.hessian.pairs import Pairs
from experiments.hessian.report import Row, by_parameter, says
from oracle_hessian import reference


def problem(model, loss, inputs, targets, kind="hessian"):
    matrices = find_matrices(model)
    return Products(kind, model, loss, dict(model.named_parameters()), matrices, [(inputs, targets)])


def measured(products, column, exact_up_to=10**6, sets=3):
    return blocks(products, column, exact_up_to, sets, chunk=7, seed=0)


def shares(found):
    return {name: value for name, (value, _) in found["shares"].items()}


def dense(kind, model, loss, inputs, targets, names):
    """The whole matrix by reverse-mode autograd, twice."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    flat = torch.cat([params[name].flatten() for name in names])

    def predict(vector):
        parts = vector.split([params[name].numel() for name in names])
        moved = {name: part.reshape(params[name].shape) for name, part in zip(names, parts, strict=True)}
        return functional_call(model, params | moved, (inputs,))

    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda vector: loss(predict(vector), targets), flat)
    jacobian = jacrev(predict)(flat).flatten(0, -2)
    outputs = predict(flat)
    inner = torch.autograd.functional.hessian(lambda out: loss(out, targets), outputs).reshape(len(jacobian), -1)
    return jacobian.T @ inner @ jacobian


@pytest.fixture(scope="module")
def micro():
    """A GPT-2 of one layer, two heads and width 4 in float64, and a batch."""
    model = build_model(ModelConfig("tiny", layers=1, heads=2, width=4), 5, 6, seed=0).double()
    for param in model.parameters():
        param.data *= 5  # initial weights make attention almost uniform
    logits = Logits(model)
    ids = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(0))
    return logits, ids[:, :-1], ids[:, 1:].flatten(), find_matrices(model)


# ---- against autograd ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_blocks_of_a_language_model_are_those_of_autograd(micro, kind):
    model, inputs, targets, matrices = micro
    loss = nn.CrossEntropyLoss()
    products = Products(kind, model, loss, dict(model.model.named_parameters()), matrices, [(inputs, targets)])
    names = list(dict.fromkeys(matrix.parameter for matrix in matrices))
    whole = dense(kind, model, loss, inputs, targets, [f"model.{name}" for name in names])
    sizes = [dict(model.model.named_parameters())[name].numel() for name in names]
    starts = dict(zip(names, [sum(sizes[:i]) for i in range(len(sizes))], strict=True))
    places = [starts[matrix.parameter] + matrix.places.flatten() for matrix in matrices]
    for column, matrix in enumerate(matrices[:4]):
        found = measured(products, column)
        for (square, error), rows in zip(found["squares"], places, strict=True):
            assert square == pytest.approx(float(whole[rows][:, places[column]].square().sum()), rel=1e-6, abs=1e-15)
            assert error == 0
        block = whole[places[column]][:, places[column]].numpy()
        assert shares(found) == pytest.approx(reference(block, *matrix.shape, matrix.groups), rel=1e-5, abs=1e-7)


def test_batches_are_averaged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    loss, matrices, params = nn.MSELoss(), find_matrices(model), dict(model.named_parameters())
    whole = Products("hessian", model, loss, params, matrices, [(inputs, targets)])
    parts = list(zip(inputs.split(2), targets.split(2), strict=True))
    halves = Products("hessian", model, loss, params, matrices, parts)
    assert shares(measured(whole, 0)) == pytest.approx(shares(measured(halves, 0)))


# ---- where the answer is known -------------------------------------------------------------------


@pytest.mark.parametrize("exact_up_to", [10**6, 0])
def test_independent_outputs_make_the_right_side_exact(exact_up_to):
    """A linear layer and squared loss: H = I kron X^T X (2/3)."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 3, bias=False).double(), torch.randn(8, 5).double()
    products = problem(model, nn.MSELoss(), inputs, torch.randn(8, 3).double())
    found = measured(products, 0, exact_up_to, sets=40)
    expected = torch.kron(torch.eye(3), inputs.T @ inputs / 8 * 2 / 3)
    value, error = found["shares"]["norm"]
    assert abs(value - float(expected.norm())) <= 4 * error + 1e-9
    if not exact_up_to:
        assert found["method"] == "probed"
        value, error = found["shares"]["right"]
        assert abs(value - 1) < 4 * error
        assert found["shares"]["rows"][0] == pytest.approx(1)  # signs of rows do not matter where rows do not interact
    else:
        assert [shares(found)[name] for name in ("rows", "right", "norm")] == pytest.approx(
            [1, 1, float(expected.norm())]
        )


def test_white_inputs_and_weighted_outputs_make_the_left_side_exact():
    """Inputs with X^T X = I and outputs that count differently: H = S kron I."""

    class Weighted(nn.Module):
        reduction = "sum"

        def forward(self, predictions, targets):
            weights = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
            return (weights * (predictions - targets).square()).sum() + predictions.sum(1).square().sum()

    inputs = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0]
    products = problem(nn.Linear(4, 3, bias=False).double(), Weighted(), inputs, torch.zeros(6, 3).double())
    found = shares(measured(products, 0))
    assert found["left"] == pytest.approx(1)
    assert found["right"] < 0.9
    assert found["rows"] < 0.999


def test_heads_that_do_not_meet_are_block_diagonal_by_head(micro):
    """Without an output projection's mixing the second head of the value has no say: its block is zero."""
    model, inputs, targets, matrices = micro
    names = [matrix.role for matrix in matrices]
    assert names[:4] == ["query", "key", "value", "output"]
    params = dict(model.model.named_parameters())
    products = Products("hessian", model, nn.CrossEntropyLoss(), params, matrices, [(inputs, targets)])
    kept = params["transformer.h.0.attn.c_proj.weight"].data.clone()
    params["transformer.h.0.attn.c_proj.weight"].data[2:] = 0  # Conv1D: rows are inputs, here of the second head
    try:
        assert shares(measured(products, 0))["groups"] == pytest.approx(1)
        assert shares(measured(products, 2))["groups"] == pytest.approx(1)
    finally:
        params["transformer.h.0.attn.c_proj.weight"].data.copy_(kept)


# ---- matrices ------------------------------------------------------------------------------------


def test_matrices_of_gpt2():
    matrices = find_matrices(build_model(ModelConfig("tiny"), 10, 8, 0))
    assert [matrix.label for matrix in matrices[:6]] == [
        *("0 query", "0 key", "0 value", "0 output", "0 c_fc", "0 c_proj")
    ]
    assert [matrix.shape for matrix in matrices[3:6]] == [(32, 32), (128, 32), (32, 128)]
    assert [matrix.heads for matrix in matrices[:6]] == [2, 2, 2, 2, 1, 1]
    assert matrices[1].name == "transformer.h.0.attn.c_attn.weight[1]"
    assert matrices[3].groups is not None
    assert matrices[3].groups[0].tolist() == [0] * 16 + [1] * 16  # an output projection's heads are its columns
    assert matrices[0].groups is not None
    assert matrices[0].groups[:, 0].tolist() == [0] * 16 + [1] * 16
    # Conv1D stores (in, out): column 1 of a row of the query is 96 numbers further on
    assert matrices[0].places[0, :2].tolist() == [0, 96]


def test_matrices_of_llama_with_shared_keys():
    matrices = find_matrices(build_model(ModelConfig("llama-tiny"), 10, 8, 0))
    found = {matrix.label: (matrix.role, matrix.heads) for matrix in matrices[:7]}
    assert found == {
        "0 query": ("query", 4),
        "0 key": ("key", 2),
        "0 value": ("value", 2),
        "0 output": ("output", 4),
        **{f"0 {name}": ("other", 1) for name in ("gate_proj", "up_proj", "down_proj")},
    }


def test_matrices_of_other_models():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Embedding(5, 3), nn.LayerNorm(3))
    assert [(matrix.name, matrix.role) for matrix in find_matrices(model)] == [
        ("0.weight", "other"),
        ("1.weight", "other"),
    ]
    assert find_matrices(nn.Embedding(5, 3)) == []


# ---- what cannot be measured ---------------------------------------------------------------------


def test_a_product_that_the_model_cannot_do_says_why():
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
    with pytest.raises(NotMeasurable, match="silu_backward"):
        measured(problem(model, nn.MSELoss(), torch.randn(5, 3), torch.randn(5, 2)), 0)
    assert measured(problem(model, nn.MSELoss(), torch.randn(5, 3), torch.randn(5, 2), "ggn"), 0)["method"] == "exact"


def test_a_product_that_is_not_finite_and_a_block_that_is_zero():
    model, inputs = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3)
    broken = inputs * torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(NotMeasurable, match="the product is not finite"):
        measured(problem(model, nn.MSELoss(), broken, torch.randn(5, 2)), 0)
    with pytest.raises(NotMeasurable, match="the block is zero"):
        measured(problem(model, nn.MSELoss(), torch.zeros(5, 3), torch.randn(5, 2)), 0)


def test_losses_that_have_no_hessian():
    model, inputs, targets = nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    assert check_loss(model, nn.MSELoss(), [(inputs, targets)]) == pytest.approx(
        F.mse_loss(model(inputs), targets).item()
    )
    with pytest.raises(LabError, match=r"the loss has shape \(5, 2\), a Hessian needs one number"):
        check_loss(model, nn.MSELoss(reduction="none"), [(inputs, targets)])
    with pytest.raises(LabError, match="the loss of batch 1 is nan"):
        check_loss(model, nn.MSELoss(), [(inputs, targets), (inputs * torch.nan, targets)])


def test_a_model_without_matrices_is_refused(monkeypatch, corpus):
    monkeypatch.setattr(measure, "build_model", lambda *_: nn.Embedding(5, 3))
    data = DataConfig(corpus=CorpusConfig(str(corpus)), block_size=8, batch_size=2)
    with pytest.raises(LabError, match="the model has no matrices"):
        build(Point(ModelConfig("tiny", width=4), data, 8, 0, 0, 0))


# ---- the answers ---------------------------------------------------------------------------------


def found(norm=1.0, **values):
    """The result of a job, with standard errors of 0.01."""
    pairs = {name: [value, 0.01] for name, value in values.items()}
    return {
        "method": "probed",
        "products": 8,
        "squares": [[norm**2, 0.0]] * 7,
        "shares": {"norm": [norm, 0.0], **pairs},
    }


def test_what_is_said_follows_from_the_numbers():
    matrices = find_matrices(build_model(ModelConfig("llama-tiny", layers=1), 10, 8, 0))
    sides = {"left": 0.3, "right": 0.5, "rows": 0.1, "scalar": 0.1}
    results = [
        found(groups=1.0, coupling=0.1, **sides),
        found(groups=0.9, coupling=0.2, **sides),
        found(groups=0.6, coupling=0.9, **sides),
        found(groups=0.3, coupling=1.1, **sides | {"right": 0.31}),
        *[found(**sides | {"left": 0.6})] * 2,
        {"reason": "the block is zero"},
    ]
    rows = [Row.of(3, "ggn", *pair) for pair in zip(matrices, results, strict=True)]
    said = "\n".join(says(rows, Pairs.of(3, "ggn", matrices, results)))
    assert "query and key block-diagonal by head, as the paper has them: yes, by head query 1.00±0.01, key 0.80" in said
    assert "value and output whole, as the paper has them: yes, by head value 0.20±0.02, output 0.07±0.01 (" in said
    assert "; coupling of heads query 0.10±0.01, key 0.20±0.01" in said
    assert "MLP whole, as the paper has it: yes, by output neuron gate_proj 0.09±0.01, up_proj 0.09±0.01 (" in said
    assert "left: 0 gate_proj, 0 up_proj; right: 0 query, 0 key, 0 value; neither: 0 output" in said
    assert "0 down_proj is not measurable: the block is zero" in said
    assert all(line.startswith("step 3, ggn: ") for line in said.splitlines())
    worse = [replaced(result, groups=0.4) for result in results[:2]] + results[2:]
    rows = [Row.of(3, "ggn", *pair) for pair in zip(matrices, worse, strict=True)]
    assert "block-diagonal by head, as the paper has them: no" in "\n".join(
        says(rows, Pairs.of(3, "ggn", matrices, worse))
    )


def replaced(result, **values):
    return result | {"shares": result["shares"] | {name: [value, 0.01] for name, value in values.items()}}


def test_several_matrices_of_one_parameter_are_told_together():
    matrices = find_matrices(build_model(ModelConfig("tiny", layers=1), 10, 8, 0))[:3]
    results = [found(norm, left=left, right=0.5) for norm, left in ((1, 0.1), (2, 0.2), (3, 0.3))]
    rows = [Row.of(0, "hessian", *pair) for pair in zip(matrices, results, strict=True)]
    (name, sides), *rest = by_parameter(rows, 0, "hessian").items()
    assert (name, rest) == ("transformer.h.0.attn.c_attn.weight", [])
    assert sides == pytest.approx({"left": ((0.01 + 4 * 0.04 + 9 * 0.09) / 14) ** 0.5, "right": 0.5})
    assert by_parameter(rows, 1, "hessian") == {}


def test_pairs_are_normalised_and_symmetric():
    matrices = find_matrices(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    results = [{"squares": [[4.0, 0.0], [9.0, 0.9]]}, {"squares": [[9.0, 0.9], [16.0, 0.0]]}]
    pairs = Pairs.of(0, "hessian", matrices, results)
    block = pairs.normalized(0, 1)
    assert block is not None
    assert block == pairs.normalized(1, 0)
    assert block.value == pytest.approx(3 / 8**0.5)
    assert block.error == pytest.approx(block.value * 0.5 * 0.9 / 2**0.5 / 9)
    assert (pairs.typical(True), pairs.typical(False)) == (block.value, None)  # their names have no number of a layer
    missing = Pairs.of(0, "hessian", matrices, [results[0], {"reason": "no"}])
    assert missing.normalized(0, 1) is None
    assert missing.normalized(1, 1) is None
    assert missing.typical(True) is None


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "letters.txt"
    path.write_text("".join(random.Random(0).choices("abcde ", k=3000)))
    return path


@pytest.fixture
def words(corpus, tmp_path):
    """A GPT-2 of one layer and width 4."""
    model = f"--corpus.name {corpus} --model.layers 1 --model.width 4 --block-size 6 --batch-size 2"
    return f"{model} --steps 0 2 --train-batch 2 --processes 1 --out {tmp_path / 'out'}".split()


@pytest.mark.slow
def test_the_command(words, tmp_path, capsys, monkeypatch):
    assert main([*words, "--exact-up-to", "16", "--probes", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "query and key block-diagonal by head, as the paper has them: " in shown
    out = tmp_path / "out"
    for name in ("plot.png", "pairs.png", "sides.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((out / "table.csv").open()))
    assert len(table) == 2 * 2 * 6
    assert {row["method"] for row in table if row["label"].endswith("c_fc")} == {"probed"}
    assert {row["by_head_error"] for row in table if row["role"] == "query"} == {"0.0"}
    assert len(list(csv.DictReader((out / "pairs.csv").open()))) == 2 * 2 * 6 * 7 / 2
    sides = json.loads((out / "sides.json").read_text())
    assert list(sides) == [
        f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert all(set(value) == {"left", "right"} for value in sides.values())
    results = json.loads((out / "results.json").read_text())
    assert results["training"]["2"]["steps"] == 2
    monkeypatch.setattr(Measure, "run", None)
    monkeypatch.setattr(Training, "run", None)
    assert main(["--out", str(out), "--resume"]) == 0


def test_what_cannot_be_measured_is_marked_and_the_rest_is_kept(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(products_module, "Swish", nn.SiLU)
    more = ["--model.family", "llama", "--model.heads", "1", "--probes", "3", "--exact-up-to", "0", "--steps", "0"]
    build.cache_clear()
    assert main([*words, *more]) == 0
    build.cache_clear()
    assert "step 0, hessian: not measurable: NotImplementedError: " in " ".join(capsys.readouterr().out.split())
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert all("silu_backward" in row["reason"] for row in table if row["curvature"] == "hessian")
    assert not any(row["reason"] for row in table if row["curvature"] == "ggn")
    assert (tmp_path / "out" / "pairs.png").exists()


@pytest.mark.slow
def test_a_training_that_diverges_leaves_the_rest(words, tmp_path, capsys):
    more = ["--probes", "3", "--exact-up-to", "0", "--curvatures", "ggn", "--optimizer.lr", "1e30"]
    assert main([*words, *more]) == 0
    assert "step 2, ggn: not measurable: the training loss is" in " ".join(capsys.readouterr().out.split())
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [bool(row["reason"]) for row in table] == [False] * 6 + [True] * 6


def test_what_is_done_survives_an_interruption(words, tmp_path, capsys, monkeypatch):
    """Ctrl-C while training, then in the middle of the blocks; the rest is done by --resume."""
    more, out = ["--probes", "3", "--exact-up-to", "0", "--curvatures", "ggn"], tmp_path / "out"

    def stopped(config):
        raise Stopped("stopped after step 1 of 2")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "train", stopped)
        assert main([*words, *more]) == 130
    resume = f"python -m experiments.hessian --out {out} --resume"
    told = f"stopped while training; its checkpoint is kept. Continue with: {resume}"
    assert told in capsys.readouterr().err
    work, began = Measure.run, []

    def interrupted(job):
        began.append(job.key)
        if len(began) == 4:
            raise KeyboardInterrupt
        return work(job)

    with monkeypatch.context() as patch:
        patch.setattr(Measure, "run", interrupted)
        assert main(["--out", str(out), "--resume"]) == 130
    kept = [json.loads(line)["job"] for line in (out / "jobs.jsonl").read_text().splitlines()]
    assert kept == ["training 2", *began[:3]]
    assert main(["--out", str(out), "--resume"]) == 0
    assert len((out / "jobs.jsonl").read_text().splitlines()) == 1 + 2 * 6


def test_a_run_folder(corpus, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    model = f"--corpus.name {corpus} --model.layers 1 --model.width 4 --model.heads 2 --block-size 8 --batch-size 2"
    assert asgo(f"train {model} --steps 3 --eval-blocks 2 --device cpu --out {run}".split()) == 0
    start = f"--run {run} --batch-size 2 --curvatures ggn --probes 3 --exact-up-to 0 --processes 1".split()
    assert main([*start, "--block-size", "6", "--out", str(out)]) == 0
    table = list(csv.DictReader((out / "table.csv").open()))
    assert {row["step"] for row in table} == {"0", "3"}
    capsys.readouterr()
    for more, message in {
        "--block-size 9": "--block-size 9 is longer than the 8 of --run",
        "--block-size 8 --steps 2": "has no checkpoint of step 2: pass --steps of 0, 3.",
        "--model.width 8": "--model does not go with --run, which has its own: leave it out.",
        "--corpus.name pydoc": "--corpus does not go with --run",
    }.items():
        assert main([*start, *more.split(), "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
    checkpoint = run / "checkpoints" / "step-00000003.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["transformer.h.0.mlp.c_fc.weight"] *= torch.nan
    torch.save(state, checkpoint)
    build.cache_clear()
    assert main([*start, "--block-size", "8", "--out", str(tmp_path / "other")]) == 2
    assert "the loss of batch 0 is nan, so there is no Hessian" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--probes 2", "--probes 2 is out of range: pass 3 or more"),
        ("--chunk 0", "--chunk 0 is out of range"),
        ("--steps -1", "--steps -1 is out of range"),
        ("--steps 0 0", "--steps 0 0: pass at least one, each once"),
        ("--curvatures ggn ggn", "--curvatures ggn ggn: pass at least one, each once"),
        ("--model.heads 3", "--model.width 4 is not a multiple of --model.heads 3"),
        (
            "--run nowhere --corpus.name shakespeare",
            "--run nowhere holds no run: pass a folder that asgo train has written",
        ),
        ("--processes 0", "--processes 0 is out of range"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, tmp_path, capsys, more, message):
    assert main([*words, *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_without_curvlinops_the_command_says_what_to_install(words, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    assert main(words) == 2
    assert "experiments.hessian needs curvlinops, which is not installed: pip install 'asgo[experiments]', then" in (
        capsys.readouterr().err
    )
