"""The examples run as they stand and learn something."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop(tmp_path, capsys):
    assert load("own_loop").main(folder=tmp_path) < 0.02
    assert "matrices that failed: none" in capsys.readouterr().out


def test_per_head_rules(capsys):
    assert load("per_head_rules").main() < 0.5
    assert "layers.0.ask.weight" in capsys.readouterr().out


def test_hf_trainer(tmp_path):
    pytest.importorskip("transformers")
    assert load("hf_trainer").main(folder=str(tmp_path)) < 2.0
    # The Trainer saves the optimizer, too, and it can be read without unpickling code.
    import torch

    saved = torch.load(next(tmp_path.glob("checkpoint-*/optimizer.pt")), weights_only=True)
    assert any("gram" in state for state in saved["state"].values())


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    source = Path(__file__).read_text()
    assert names
    assert all(f'load("{name}")' in source for name in names)
