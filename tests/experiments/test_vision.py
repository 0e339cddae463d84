"""``asgo vision``: its images, one run, the choice of rates, and what it says of errors and gaps."""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from asgo.lab.compare.paired_test import paired_test
from asgo.lab.data.rows import Rows
from asgo.lab.errors import LabError
from experiments.vision import experiment, images
from experiments.vision.__main__ import main
from experiments.vision.experiment import VisionConfig
from experiments.vision.images import load
from experiments.vision.training import METHODS, Training, measure, resnet

pytest.importorskip("sklearn")

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path, array):
    """The format of MNIST's files."""
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty training and ten test images that differ in brightness, half of the files compressed."""
    path = tmp_path_factory.mktemp("fashion")
    for part, count, names in (("train", 40, NAMES[:2]), ("t10k", 10, NAMES[2:])):
        labels = np.arange(count) % 10
        pixels = np.broadcast_to(25 * labels[:, None, None], (count, 28, 28)).copy()
        pixels[:, 0, 0] = np.arange(count)  # tells the images apart
        write_idx(path / (names[0] + ".gz"), pixels)
        write_idx(path / names[1], labels)
        assert part in names[0]
    return path


def job(folder, **change):
    fields = {"data": "fashion-mnist", "folder": folder, "images": 30, "method": "adam", "lr": 0.01, "seed": 0}
    fields |= {"final": True, "epochs": 2, "batch": 8, "widths": (8, 8), "depths": (1, 1)}
    return Training(**fields | {"schedule": experiment.SCHEDULE} | change)


# ---- images --------------------------------------------------------------------------------------


def test_fashion_mnist_is_read_split_and_standardised(folder):
    data = load("fashion-mnist", folder, 30)
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [30, 8, 10]
    assert data.train.inputs.shape == (30, 1, 28, 28)
    assert float(data.train.inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train.inputs.std()) == pytest.approx(1, abs=1e-2)
    assert data.test.targets.tolist() == list(range(10))
    marks = [set(part.inputs[:, 0, 0, 0].tolist()) for part in (data.train, data.validation)]
    assert len(marks[0] | marks[1]) == 38  # no image in both
    for part in (data.train, data.validation, data.test):  # brightness is the class
        brightness = part.inputs[:, 0, 5, 5]
        assert torch.equal(brightness.argsort(stable=True), part.targets.argsort(stable=True))


def test_digits_stand_in():
    data = load("digits", Path("/nowhere"), 10_000)
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [1151, 287, 359]
    assert data.train.inputs.shape[1:] == (1, 28, 28)
    assert set(data.test.targets.tolist()) == set(range(10))


def test_auto_is_what_is_there(folder, tmp_path):
    assert images.resolve("auto", folder) == "fashion-mnist"
    assert images.resolve("auto", tmp_path) == "digits"
    assert images.resolve("digits", folder) == "digits"


def test_files_that_are_not_there_or_broken(folder, tmp_path):
    with pytest.raises(
        LabError, match=r"has no file train-images-idx3-ubyte in .* Debian package dataset-fashion-mnist"
    ):
        load("fashion-mnist", tmp_path, 10)
    for content in (b"\0\0\x08\x01\0\0\0\x05ab", b"not idx"):
        (tmp_path / NAMES[0]).write_bytes(content)
        with pytest.raises(LabError, match="is not an IDX file of bytes, or it was cut short"):
            load("fashion-mnist", tmp_path, 10)


# ---- runs ----------------------------------------------------------------------------------------


def test_the_seed_alone_decides_the_first_weights():
    first, same, other = (resnet((8, 8), (1, 1), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(folder, method):
    found = job(folder, method=method, epochs=4).run()
    assert found["losses"][-1] < found["losses"][0]
    assert found["state_bytes"] > 0
    assert 0 <= found["train"]["error"] <= 1
    assert "validation" not in found


def test_a_run_repeats_itself_and_tuning_never_sees_the_test_images(folder):
    first, second = (job(folder, final=False).run() for _ in range(2))
    assert first["losses"] == second["losses"]
    assert first["validation"] == second["validation"]
    assert not {"train", "test"} & set(first)


def test_a_run_that_diverges_stops_early(folder):
    found = job(folder, method="nag", lr=1e30).run()
    assert found["losses"] == [math.inf]
    assert found["test"]["error"] >= 0.5


def test_errors_are_counted():
    class Fixed(torch.nn.Module):
        def forward(self, pixel_values):
            scores = torch.nn.functional.one_hot(pixel_values.flatten(1)[:, 0].long(), 10)
            return type("Output", (), {"logits": scores.float() * 20})

    part = Rows(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None], torch.tensor([1, 2, 3, 5]))
    found = measure(Fixed(), part)
    assert found["error"] == 0.25
    assert found["loss"] == pytest.approx(5.0, abs=1e-3)


# ---- the experiment ------------------------------------------------------------------------------


def made_up(validation):
    """Results of all jobs; the validation error is a function of method and rate, the rest of the seed."""

    def run(self):
        if not self.final:
            return {"losses": [1.0], "validation": {"loss": 1.0, "error": validation(self.method, self.lr)}}
        wrong = {"nag": 0.20, "adam": 0.15}.get(self.method, 0.10) + 0.01 * self.seed
        measured = {"train": {"loss": 0.1, "error": wrong / 2}, "test": {"loss": 0.2, "error": wrong + 1e-3 * self.lr}}
        return {"losses": [1.0, 0.5], "seconds_per_step": 0.01, "state_bytes": 1000, **measured}

    return run


def test_rates_are_chosen_on_validation_errors_then_all_seeds_run(tmp_path, capsys, folder, monkeypatch):
    best = {"nag": 0.1, "adam": 0.001}
    monkeypatch.setattr(Training, "run", made_up(lambda method, lr: abs(lr - best.get(method, 0.01))))
    out = tmp_path / "vision"
    words = ["--folder", str(folder), "--images", "30", "--batch", "8", "--seeds", "0", "1", "2"]
    assert main([*words, "--processes", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert {name: row["lr"] for name, row in rows.items()} == {name: best.get(name, 0.01) for name in METHODS}
    assert not rows["adam"]["bracketed"]
    assert rows["nag"]["bracketed"]
    assert rows["bagm-b1"]["test_error"] == pytest.approx(11, abs=0.01)
    assert rows["bagm-b1"]["gap"] == pytest.approx(5.5, abs=0.01)
    assert "0.001 (edge)" in shown
    assert "lower in the mean in 8 of 8 pairs" in shown
    assert len((out / "jobs.jsonl").read_text().splitlines()) == 6 * 6 + 6 * 3
    monkeypatch.setattr(Training, "run", None)
    assert main(["--out", str(out), "--resume"]) == 0


def test_one_real_run_of_the_command(tmp_path, capsys):
    out = tmp_path / "vision"
    words = "--data digits --images 64 --batch 16 --epochs 1 --methods nag bagm-b1 --rates 0.01 0.1 --seeds 0 1 2"
    small = "--widths 8 --depths 1 --processes 1"
    assert main([*words.split(), *small.split(), "--out", str(out)]) == 0
    assert "bagm-b1 - nag" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["data"] == "digits"
    assert results["rows"][0]["seconds_per_step"] > 0
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_answer_names_who_is_better_than_whom():
    tests = [
        paired_test("bagm-b1", "nag", [(1.0, 2.0), (1.1, 2.2), (1.2, 2.1)]),
        paired_test("bagm-b1", "adam", [(1.0, 0.9), (1.1, 1.2), (1.2, 1.0)]),
    ]
    said = experiment._answer(tests)
    assert "lower in the mean in 1 of 2 pairs" in said
    assert "lower: bagm-b1 than nag; higher: none" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--methods sgd", "method 'sgd' does not exist: choose from nag, adam, bagm-b1"),
        ("--seeds 1 1", "--seeds 1 1: pass at least one, each once"),
        ("--tune-seed 0", "--tune-seed 0 is also one of --seeds"),
        ("--widths 8", "--widths has 1 stages, --depths 3"),
        ("--epochs 0", "must be 1 or more"),
        ("--batch 5000", "--batch 5000 is more than the 1151 training images"),
        ("--data fashion-mnist --folder .", "fashion-mnist has no file train-images-idx3-ubyte in ."),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "digits", "--out", "vision", *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("vision").exists()


def test_the_defaults_are_a_comparison_of_all_methods():
    assert VisionConfig().methods == tuple(METHODS)
    assert VisionConfig().tune_seed not in VisionConfig().seeds
