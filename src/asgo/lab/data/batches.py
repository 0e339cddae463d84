"""Data of a run: from the name of a corpus to batches of token ids and a held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from asgo.lab.config.ranges import TOKENS, check_ranges
from asgo.lab.data.cache import cache_folder, write_cached
from asgo.lab.data.corpora import BLOCKS, CorpusConfig, DocumentStream, read_text
from asgo.lab.data.images import open_images
from asgo.lab.data.instructions import open_instructions
from asgo.lab.data.pinned import PART_BREAK
from asgo.lab.data.rows import RowData
from asgo.lab.data.sampling import Batches, Draw, Pair, StreamingBatches, TrainBatches, validation_blocks
from asgo.lab.data.tokenization import Tokenizer, TokenizerConfig, build_tokenizer, text_hash
from asgo.lab.errors import LabError
from asgo.lab.pretrained import load_tokenizer

TOKENIZER_SAMPLE = 10_000_000
"""Characters of a stream, after the held-out documents, that a vocabulary is learned from."""


@dataclass(frozen=True)
class DataConfig:
    """What a model learns from and in which portions.

    Args:
        corpus: which text.
        tokenizer: what one token is.
        block_size: tokens a model sees at once.
        batch_size: blocks per batch and process.
    """

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    block_size: Annotated[int, TOKENS] = 128
    batch_size: Annotated[int, BLOCKS] = 16

    def check(self) -> None:
        """Raise LabError for a value out of its range, here or in the parts."""
        check_ranges(self)
        self.corpus.check()
        self.tokenizer.check()


@dataclass(frozen=True)
class TokenData:
    """A whole corpus as token ids.

    Args:
        train: ids to learn from, shape (tokens,).
        validation: ids of the held-out end of the text, shape (tokens,).
        tokenizer: what made them.
        fingerprint: sha256 of text, tokenizer and split.
        description: one line about text, tokens and vocabulary.
        characters_per_token: of the held-out text; nats per token divided by it are nats per character.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    description: str
    characters_per_token: float

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids."""
        return self.tokenizer.vocab_size


def load_tokens(config: DataConfig, cache_dir: Path | None = None) -> TokenData:
    """Read a corpus, split it on characters, and encode both parts.

    The last ``validation_fraction`` of the text is held out before anything is learned from it; of botocore from the
    beginning of a service. Learned byte pairs and their ids are kept in `cache_dir`, by default the user's cache.

    Raises:
        LabError: for a corpus that cannot be read, or is shorter than one block in either part.
    """
    config.check()
    text = read_text(config.corpus)
    cut = len(text) - round(len(text) * config.corpus.validation_fraction)
    if config.corpus.name == "botocore":
        cut = text.rindex(PART_BREAK, 0, cut) + 1
    parts = text[:cut], text[cut:]
    cache = cache_dir or cache_folder()
    tokenizer = build_tokenizer(config.tokenizer, *parts, cache)
    fingerprint = _hash(text_hash(text), cut, tokenizer.fingerprint)
    train, validation = (
        _encode_cached(tokenizer, part, cache / "tokens" / f"{fingerprint}.{name}.npy")
        for part, name in zip(parts, ("train", "validation"), strict=True)
    )
    _check_length(train, "training", config)
    _check_length(validation, "validation", config)
    sizes = f"{len(train):,} training and {len(validation):,} validation tokens"
    about = f"{config.corpus.name}: {len(text):,} characters, {len(set(text)):,} distinct"
    description = f"{about}; {sizes}, vocabulary {tokenizer.vocab_size:,}"
    return TokenData(train, validation, tokenizer, fingerprint, description, len(parts[1]) / len(validation))


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _encode_cached(tokenizer: Tokenizer, text: str, file: Path) -> np.ndarray:
    if tokenizer.vocab_size <= 256:
        return tokenizer.encode(text)  # Faster than reading a file.
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):  # Not there, or damaged: encode again.
        ids = tokenizer.encode(text)
        write_cached(file, lambda opened: np.save(opened, ids))
        return ids


def _check_length(ids: np.ndarray, part: str, config: DataConfig) -> None:
    if len(ids) <= config.block_size:
        what = f"the {part} part of corpus '{config.corpus.name}' has {len(ids):,} tokens"
        need = f"one block needs {config.block_size + 1:,} (--block-size {config.block_size} and the next token)"
        raise LabError(f"{what}, but {need}. Pass a longer corpus, a smaller --block-size, or another split.")


@dataclass(frozen=True)
class Data:
    """All that a trainer needs to know about its data.

    Args:
        batches: training batches of this process.
        held_out: ids of the validation text, shape (tokens,), the same in every process.
        block_size: tokens per block.
        tokenizer: what made the ids.
        fingerprint: hash of text, tokenizer and split; of a stream: of its name, tokenizer and held-out text.
        description: one line about text, tokens and vocabulary.
        characters_per_token: of the held-out text; nats per token divided by it are nats per character.
    """

    batches: Batches
    held_out: np.ndarray
    block_size: int
    tokenizer: Tokenizer
    fingerprint: str
    description: str
    characters_per_token: float

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids."""
        return self.tokenizer.vocab_size

    def validation(self, batch_size: int, max_blocks: int | None = None) -> Iterator[Pair]:
        """Yield the same validation blocks each time; see `validation_blocks`."""
        return validation_blocks(self.held_out, self.block_size, batch_size, max_blocks)


def open_data(
    config: DataConfig, seed: int = 0, rank: int = 0, world: int = 1, cache_dir: Path | None = None
) -> Data | RowData:
    """Open the data of a run: whole text, stream, or rows.

    Args:
        config: corpus, tokenizer and batch shape.
        seed: seed of the order of training blocks.
        rank: which process this is.
        world: how many processes share a step; together they take batch_size * world blocks.
        cache_dir: folder that keeps what was learned and encoded; None for the user's cache.

    Raises:
        LabError: for a value out of range, or a corpus that is missing, empty, not text or too short.
    """
    config.check()
    draw = Draw(config.block_size, config.batch_size, seed, rank, world)
    if config.corpus.images:
        return open_images(config.corpus, draw)
    if config.corpus.instructions:
        return _open_instructions(config, draw, cache_dir)
    if config.corpus.streams:
        return _open_stream(config, draw, cache_dir)
    tokens = load_tokens(config, cache_dir)
    batches = TrainBatches(tokens.train, replace(draw, fingerprint=tokens.fingerprint))
    return Data(
        batches,
        tokens.validation,
        config.block_size,
        tokens.tokenizer,
        tokens.fingerprint,
        tokens.description,
        tokens.characters_per_token,
    )


def _open_instructions(config: DataConfig, draw: Draw, cache_dir: Path | None) -> RowData:
    corpus, model = config.corpus, config.tokenizer.model
    text = read_text(corpus) if model is None else ""
    tokenizer = build_tokenizer(config.tokenizer, text, "", cache_dir)
    return open_instructions(corpus, draw, tokenizer, None if model is None else load_tokenizer(model))


def _open_stream(config: DataConfig, draw: Draw, cache_dir: Path | None) -> Data:
    corpus = config.corpus
    stream = DocumentStream(corpus)
    held_out = stream.take(corpus.validation_characters)
    if not held_out:
        what = f"corpus '{corpus.name}' is empty"
        raise LabError(f"{what}. Pass --corpus.name, or --corpus.data-files, with a corpus that has text.")
    start = stream.state_dict()
    tokenizer = _stream_tokenizer(config.tokenizer, stream, cache_dir)
    stream.load_state_dict(start)
    ids = tokenizer.encode(held_out)
    _check_length(ids, "validation", config)
    source = (corpus.name, corpus.split, corpus.text_field, corpus.data_files)
    fingerprint = _hash(*source, tokenizer.fingerprint, text_hash(held_out))
    batches = StreamingBatches(stream, tokenizer, replace(draw, fingerprint=fingerprint), corpus.shuffle_blocks)
    description = (
        f"{corpus.name}: a stream, its first {len(held_out):,} characters ({len(ids):,} tokens) held out; "
        f"vocabulary {tokenizer.vocab_size:,}"
    )
    per_token = len(held_out) / len(ids)
    return Data(batches, ids, config.block_size, tokenizer, fingerprint, description, per_token)


def _stream_tokenizer(config: TokenizerConfig, stream: DocumentStream, cache_dir: Path | None) -> Tokenizer:
    kind = "byte" if config.kind == "auto" else config.kind
    learns = kind in ("char", "bpe")
    sample = stream.take(TOKENIZER_SAMPLE) if learns else ""
    return build_tokenizer(replace(config, kind=kind), sample, None, cache_dir)
