"""Named workloads, and what they are made of: images, prompts with responses, models with weights."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from asgo.lab import cli
from asgo.lab.config.checks import validate
from asgo.lab.config.codec import command
from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from asgo.lab.config.workloads import WORKLOADS
from asgo.lab.data import pinned
from asgo.lab.data.batches import DataConfig, load_tokens, open_data
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.data.images import load_images
from asgo.lab.data.instructions import pieces, read_examples
from asgo.lab.data.rows import IGNORED, RowBatches, Rows, in_batches
from asgo.lab.data.sampling import Draw
from asgo.lab.data.tokenization import TokenizerConfig
from asgo.lab.errors import LabError
from asgo.lab.models.language import build_model, check_model
from asgo.lab.pretrained import load_model, load_tokenizer
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.stopping import Stopped
from asgo.lab.training.train import Trainer, train

TIMES = ("seconds", "optimizer_seconds", "tokens_per_second")
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path, array):
    """The format of MNIST's files, compressed."""
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty training and twenty test images that differ in brightness."""
    path = tmp_path_factory.mktemp("fashion")
    for count, names in ((60, NAMES[:2]), (20, NAMES[2:])):
        labels = np.arange(count) % 10
        write_idx(path / f"{names[0]}.gz", np.broadcast_to(25 * labels[:, None, None], (count, 28, 28)))
        write_idx(path / f"{names[1]}.gz", labels)
    return path


def run(out, data, model, **change):
    cadence = CadenceConfig(log_every=2, eval_every=3, eval_blocks=4, checkpoint_every=3)
    config = TrainConfig(
        data=data, model=model, machine=MachineConfig("cpu", threads=1), cadence=cadence, steps=6, out=out
    )
    return replace(config, **change)


@pytest.fixture
def images(folder, tmp_path):
    corpus = CorpusConfig("fashion-mnist", data_files=str(folder))
    return run(tmp_path / "run", DataConfig(corpus, batch_size=8), ModelConfig("vit", layers=1, width=16))


def stopped_and_resumed(config, out, monkeypatch):
    """The same run in another folder, stopped in its fifth step and resumed."""
    config = replace(config, out=out)
    step = Trainer._train_step

    def stopping(self):
        step(self)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping)
        with pytest.raises(Stopped):
            train(config)
    train(replace(config, resume=True))
    return out


def numbers(out):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in RunFolder(out).metrics()]


def state(out):
    found = RunFolder(out).load()
    assert found is not None
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(one, other):
    assert numbers(one) == numbers(other)
    assert same(state(one)["model"], state(other)["model"])


def refused(message, call, *arguments):
    """Check that a call raises a LabError of one line that matches."""
    with pytest.raises(LabError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


# ---- rows ----------------------------------------------------------------------------------------


def test_every_row_is_seen_once_in_each_pass():
    rows = Rows(torch.arange(10)[:, None].float(), torch.arange(10))
    batches = RowBatches(rows, Draw(1, 4, seed=3))
    seen = torch.cat([batches.batch(step)[1] for step in range(10)]).tolist()
    passes = [seen[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4
    assert torch.equal(batches.batch(2)[1], torch.tensor(seen[8:12]))  # any step at any time
    other = RowBatches(rows, Draw(1, 4, seed=4))
    assert other.batch(0)[1].tolist() != seen[:4]
    refused("seed 4, this run 3", batches.load_state_dict, other.state_dict())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_rows_of_a_step(world):
    targets = torch.full((9, 6), IGNORED)
    targets[torch.arange(9), torch.arange(9) % 6] = 1
    rows = Rows(torch.arange(54).view(9, 6), targets)
    whole = RowBatches(rows, Draw(6, 4))
    parts = [RowBatches(rows, Draw(6, 4 // world)).at(rank, world) for rank in range(world)]
    for step in range(5):
        for number in range(2):
            assert torch.equal(torch.cat([part.batch(step)[number] for part in parts]), whole.batch(step)[number])


def test_columns_without_a_target_in_the_batch_are_left_out():
    targets = torch.full((3, 6), IGNORED)
    targets[0, 1] = targets[1, 3] = targets[2, 5] = 7
    rows = Rows(torch.arange(18).view(3, 6), targets)
    assert [rows.take(np.array(index))[0].shape[1] for index in ([0], [0, 1], [2, 0])] == [2, 4, 6]


def test_evaluation_rows_lie_evenly():
    rows = Rows(torch.arange(10.0)[:, None], torch.arange(10))
    assert [pair[1].tolist() for pair in in_batches(rows, 2, 5)] == [[0, 2], [4, 6], [8]]
    assert sum(len(pair[1]) for pair in in_batches(rows, 3)) == 10


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [ModelConfig("vit", layers=1, width=16), ModelConfig("resnet", layers=2, width=16)])
def test_images_are_trained_stopped_and_resumed(images, tmp_path, monkeypatch, model):
    config = replace(images, model=model)
    result = train(config)
    assert_same_run(config.out, stopped_and_resumed(config, tmp_path / "other", monkeypatch))
    assert [line["step"] for line in numbers(config.out) if "val_accuracy" in line] == [0, 3, 6]
    assert result["tokens"] == 6 * 8
    assert "54 training, 6 validation and 20 test images" in result["data"]


def test_errors_of_the_test_images_are_those_of_the_last_weights(images, folder):
    images = replace(images, cadence=replace(images.cadence, final_eval_blocks=0))
    result = train(images)
    model = build_model(images.model, 10, 1, 0)
    model.load_state_dict(state(images.out)["model"])
    model.eval()
    test = load_images("fashion-mnist", folder, 0.1).test
    logits = model(pixel_values=test.inputs).logits.double()
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, test.targets).item(), rel=1e-5)
    assert result["test_accuracy"] == (logits.argmax(1) == test.targets).double().mean().item()


def test_a_resnet_learns_digits(tmp_path):
    pytest.importorskip("sklearn")
    data = DataConfig(CorpusConfig("digits"), batch_size=16)
    model, optimizer = ModelConfig("resnet", layers=2, width=16), OptimizerConfig("adamw", lr=0.01)
    assert train(run(tmp_path / "run", data, model, optimizer=optimizer, steps=40))["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("corpus", "model", "message"),
    [
        (
            "digits",
            ModelConfig("tiny"),
            "digits is images, which gpt2 does not read: pass --model.family vit or resnet",
        ),
        ("pydoc", ModelConfig("vit"), "pydoc is text, which vit does not read: pass --model.family gpt2 or llama"),
        ("digits", ModelConfig("resnet", layers=5, width=24), "--model.width 24 cannot be halved 4 times"),
        ("digits", ModelConfig("vit", width=30), "--model.width 30 is not a multiple of --model.heads 4"),
        ("digits", ModelConfig("vit", kv_heads=2), "vit has one key head per query"),
    ],
)
def test_models_and_corpora_that_do_not_fit(tmp_path, corpus, model, message):
    refused(message, train, run(tmp_path / "run", DataConfig(CorpusConfig(corpus)), model))
    assert not (tmp_path / "run").exists()


def test_images_that_are_not_there(tmp_path):
    data = DataConfig(CorpusConfig("fashion-mnist", data_files=str(tmp_path)))
    refused("has no file train-images-idx3-ubyte in .* Debian package dataset-fashion-mnist", open_data, data)


# ---- botocore's documentation --------------------------------------------------------------------


def test_documentation_is_read_once_and_split_between_services(tmp_path, monkeypatch):
    monkeypatch.setenv("ASGO_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "botocore-1.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for service in range(20):
            shapes = [{"documentation": f"<p>Text &amp; {service}\n of one</p>"}, {"documentation": "Said before."}]
            content = {"shapes": shapes, "documentation": {"documentation": "<b></b>"}}
            file.writestr(
                f"botocore/data/s{service:02}/1/service-2.json.gz", gzip.compress(json.dumps(content).encode())
            )
    raw = pinned._services(wheel)
    assert raw.decode().split("\f")[:2] == ["Text & 0 of one\nSaid before.", "Text & 1 of one"]
    monkeypatch.setattr(pinned.Pinned, "read", lambda self: raw.decode())
    data = load_tokens(DataConfig(CorpusConfig("botocore", validation_fraction=0.12), block_size=8))
    train_text, held_out = (data.tokenizer.decode(part) for part in (data.train, data.validation))
    assert train_text + held_out == raw.decode()
    assert train_text.endswith("\f")
    assert held_out.count("\f") == 2


# ---- prompts and responses -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(f"the number {i} comes after {i - 1}." for i in range(600)))
    return path


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory):
    """A small model that `asgo train` has saved, and what its run gave."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    data = DataConfig(CorpusConfig(str(text)), TokenizerConfig("bpe", 300), block_size=32, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASGO_CACHE", str(out.parent / "cache"))
        result = train(run(out, data, ModelConfig("llama-tiny"), save_model=True))
    return str(out / "model"), result


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": f"What comes after {i}? ", "response": f"the number {i + 1}." * (1 + i % 3)} for i in range(30)]
    rows.append({"messages": [{"role": "user", "content": "hello "}, {"role": "assistant", "content": "yes"}]})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_the_loss_is_that_of_the_responses(pretrained, examples):
    name, _ = pretrained
    data = DataConfig(CorpusConfig(str(examples)), TokenizerConfig(f"model:{name}"), block_size=48, batch_size=31)
    opened = open_data(replace(data, corpus=replace(data.corpus, validation_fraction=0.05)))
    inputs, targets = opened.batches.batch(0)
    assert len(inputs) == 31
    tokenizer = load_tokenizer(name)
    known = {
        "".join(m["content"] for m in example[:1]): example[1]["content"] for example in read_examples(str(examples))
    }
    for row, wanted in zip(inputs, targets, strict=True):
        learned = (wanted != IGNORED).nonzero().flatten()
        assert learned.tolist() == list(range(int(learned[0]), int(learned[-1]) + 1))
        prompt = tokenizer.decode(row[: int(learned[0]) + 1])
        response = tokenizer.decode(wanted[learned])
        assert known[prompt].startswith(response)
        assert response == known[prompt] or int(learned[-1]) == 47


class Chat:
    """A chat template as `transformers` applies it."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        said = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return said + ("<assistant>" if add_generation_prompt else "")


def test_of_a_chat_what_the_assistant_says_is_learned():
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    found = list(pieces(messages, Chat()))
    assert [text for text, learned in found if learned] == ["2</>", "4</>"]
    assert "".join(text for text, _ in found) == Chat().apply_chat_template(messages[:5], False, False)

    class Forgetful(Chat):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return super().apply_chat_template(messages[-1:], tokenize, add_generation_prompt)

    refused("chat template changes earlier messages", list, pieces(messages, Forgetful()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"line 2 of '.*' is not JSON: .* Write one object a line, with prompt and response"),
        (
            '{"prompt": "a", "answer": "b"}',
            "line 2 of '.*' has keys prompt, answer: write prompt and response, or messages",
        ),
        ("[1]", "line 2 of '.*' has list: write prompt and response"),
        ('{"prompt": 1, "response": "b"}', "line 2 of '.*' has messages that are not texts with a role"),
        ('{"messages": [{"role": "user"}]}', "line 2 of '.*' has messages that are not texts with a role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2 of '.*' has no response"),
        ('{"prompt": "a", "response": ""}', "line 2 of '.*' has no response"),
    ],
)
def test_lines_that_are_no_example(examples, line, message):
    lines = examples.read_text().splitlines()
    examples.write_text("\n".join([lines[0], line, *lines[1:]]))
    refused(message, open_data, DataConfig(CorpusConfig(str(examples)), TokenizerConfig("byte")))


def test_examples_that_fit_no_block(examples):
    data = DataConfig(CorpusConfig(str(examples)), TokenizerConfig("byte"), block_size=64)
    assert ", 20 cut at --block-size and 0 left out" in open_data(replace(data, block_size=37)).description
    refused(r"has 1 of 31 examples with a response within --block-size 9", open_data, replace(data, block_size=9))


# ---- models with weights -------------------------------------------------------------------------


@pytest.fixture
def tuned(pretrained, text, tmp_path):
    """Going on from the saved model with the same text."""
    data = DataConfig(CorpusConfig(str(text)), block_size=32, batch_size=4)
    return run(tmp_path / "tuned", data, ModelConfig(pretrained=pretrained[0]))


def test_a_saved_model_goes_on_where_it_ended(tuned, pretrained):
    train(tuned)
    assert numbers(tuned.out)[0]["val_loss"] == pytest.approx(pretrained[1]["val_loss"], rel=1e-5)
    assert numbers(tuned.out)[-1]["val_loss"] < pretrained[1]["val_loss"]


@pytest.mark.parametrize("rank", [0, 2])
def test_fine_tuning_on_responses_is_resumed_bit_for_bit(tuned, examples, tmp_path, monkeypatch, rank):
    if rank:
        pytest.importorskip("peft")
    model = replace(tuned.model, lora_rank=rank, dtype="bfloat16")
    data = DataConfig(CorpusConfig(str(examples)), block_size=32, batch_size=4)
    config = replace(tuned, model=model, data=data, save_model=True)
    train(config)
    assert_same_run(config.out, stopped_and_resumed(config, tmp_path / "other", monkeypatch))
    weights = state(config.out)["model"]
    if rank:
        assert all("lora_" in name for name in weights)
    else:
        assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
        assert same(weights, load_model(str(config.out / "model"), {"dtype": torch.bfloat16}).state_dict())


def test_factors_alone_are_trained_and_saved(tuned, pretrained, tmp_path):
    peft = pytest.importorskip("peft")
    config = replace(tuned, model=replace(tuned.model, lora_rank=2), save_model=True)
    result = train(config)
    base = load_model(pretrained[0], {})
    assert result["parameters"] == 2 * sum(
        sum(module.weight.shape)
        for name, module in base.named_modules()
        if hasattr(module, "in_features") and "head" not in name
    )
    again = peft.PeftModel.from_pretrained(base, str(config.out / "model"))
    before = load_model(pretrained[0], {}).state_dict()
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in again.base_model.model.state_dict().items()
        if name in before
    )
    inputs, targets = next(open_data(config.model_data).validation(4, 4))
    loss = F.cross_entropy(again(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(result["val_loss"], rel=1e-5)


def test_factors_go_with_the_weights_that_they_were_trained_on(tuned, pretrained, tmp_path):
    pytest.importorskip("peft")
    base = load_model(pretrained[0], {})
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(pretrained[0]).save_pretrained(tmp_path / "base")
    config = replace(tuned, model=ModelConfig(pretrained=str(tmp_path / "base"), lora_rank=2))
    train(config)
    (config.out / "result.json").unlink()
    with torch.no_grad():
        base.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.01)
    base.save_pretrained(tmp_path / "base")
    refused("is of another model", train, replace(config, resume=True))


def test_the_first_layers_of_a_model(pretrained):
    model = build_model(ModelConfig(pretrained=pretrained[0], layers=1), 300, 32, 0)
    whole = load_model(pretrained[0], {}).state_dict()
    assert len(model.get_submodule("model.layers")) == 1
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            {"pretrained": "./nowhere"},
            {},
            r"--model.pretrained ./nowhere gives no tokenizer: there is no such folder\. Pass",
        ),
        ({"pretrained": "own/er/name"}, {}, "gives no tokenizer: there is no such folder"),
        (
            {"pretrained": "owner/name"},
            {},
            "--model.pretrained owner/name gives no tokenizer: .* OWNER/NAME of the hub",
        ),
        ({"width": 64}, {}, "says all about the model: leave the other --model flags out, but for layers, lora-rank"),
        ({"pretrained": None, "lora_rank": 2}, {}, "--model.lora-rank 2 is for a model of --model.pretrained"),
        (
            {},
            {"tokenizer": TokenizerConfig("char")},
            "--tokenizer.kind char: the tokenizer of --model.pretrained is its own",
        ),
        ({}, {"block_size": 33}, "reads 32 tokens, --block-size is 33"),
        ({}, {"corpus": CorpusConfig("digits")}, "digits is images"),
    ],
)
def test_fine_tuning_that_cannot_be(tuned, model, data, message):
    config = replace(tuned, model=replace(tuned.model, **model), data=replace(tuned.data, **data))
    refused(message, train, config)
    assert not config.out.exists()


def test_an_empty_folder_and_a_missing_package(tuned, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    refused("gives no tokenizer: ", load_tokenizer, str(tmp_path / "empty"))
    refused("gives no causal language model: ", load_model, str(tmp_path / "empty"), {})
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    config = replace(tuned, model=replace(tuned.model, lora_rank=2))
    refused(r"--model.lora-rank needs peft, which is not installed: pip install 'asgo\[finetune\]'", train, config)


# ---- the commands of docs/reproductions.md --------------------------------------------------------


def documented():
    page = (Path(__file__).parents[2] / "docs" / "reproductions.md").read_text()
    return [line.split()[1:] for line in page.splitlines() if line.startswith("asgo train --corpus.name")]


@pytest.mark.parametrize("number", range(4))
def test_experiments_of_the_paper_on_local_files(number, pretrained, text, examples, tmp_path, monkeypatch):
    """The documented flags, with local files, a small model and few steps in place of the real ones."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text.read_text()[i : i + 200]}) for i in range(0, 8000, 200)))
    words = documented()[number]
    config = cli.parse(words)
    data = replace(config.data, block_size=32, batch_size=2)
    if data.corpus.instructions:
        data = replace(data, corpus=replace(data.corpus, name=str(examples)))
    else:
        here = replace(data.corpus, name="hub:json", data_files=str(rows), validation_characters=500, shuffle_blocks=8)
        data = replace(data, corpus=here)
    if data.tokenizer.model:
        data = replace(data, tokenizer=TokenizerConfig(f"model:{pretrained[0]}"))
    model = replace(config.model, pretrained=pretrained[0]) if config.model.pretrained else ModelConfig("llama-tiny")
    cadence = CadenceConfig(eval_every=2, eval_blocks=2)
    machine = replace(config.machine, device="cpu", threads=1)
    small = {"data": data, "model": model, "machine": machine, "cadence": cadence, "out": tmp_path / "run"}
    result = train(replace(config, **small, steps=2, grad_accumulation=2))
    assert result["status"] == "finished"
    assert len(documented()) == 4


# ---- by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_can_be_built(name):
    config = WORKLOADS[name]
    validate(config)
    check_model(config)
    if config.model.pretrained is None:
        with torch.device("meta"):
            build_model(config.model, 100, config.data.block_size, 0)


def test_a_workload_is_where_the_flags_start_from():
    config = cli.parse(["compare", "--workload", "vit", "--steps", "7", "--seeds", "5"])
    expected = replace(WORKLOADS["vit"], steps=7)
    assert all(getattr(config, field.name) == getattr(expected, field.name) for field in fields(RunConfig))
    assert config.seeds == (5,)
    assert cli.parse(["train", "--workload=vit"]).data == expected.data
    again = cli.parse(command("compare", config).split())
    assert again == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--workload", "mnist"],
            "--workload mnist does not exist: choose from shakespeare, shakespeare-128, bpe, experts, vit, resnet",
        ),
        (["train", "--workload"], "--workload  does not exist"),
        (["demo", "--workload", "vit"], "asgo demo has no --workload: it is for asgo train and asgo compare"),
    ],
)
def test_workloads_that_do_not_exist(words, message):
    refused(message, cli.parse, words)


def test_a_workload_is_resumed_with_its_own_settings(images, tmp_path, monkeypatch):
    train(images)
    words = ["train", "--out", str(images.out), "--resume"]
    assert cli.parse(words).data == images.data
    assert isinstance(Path(images.out), Path)
