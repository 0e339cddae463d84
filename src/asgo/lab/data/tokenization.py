"""How text becomes numbers: characters, bytes, or byte pairs learned from the corpus."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from asgo.lab.data.cache import cache_folder, write_cached
from asgo.lab.errors import LabError
from asgo.lab.pretrained import load_tokenizer

CHUNK = 10_000
"""Characters of text that byte pairs are learned from, and applied to, at a time."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What a character outside the vocabulary is decoded to."""

GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Names that the two files of a GPT-2 vocabulary go by."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What one token is.

    Args:
        kind: auto (char; byte for streams; the model's own with --model.pretrained), char, byte, bpe (learned from
            the corpus), the path of a tokenizer.json, or of a folder with one or with GPT-2's vocab.json and
            merges.txt, or model:NAME, the tokenizer of a model as --model.pretrained names it.
        vocab_size: bpe: tokens to learn, the 256 bytes among them.
    """

    kind: str = "auto"
    vocab_size: int = 4096

    @property
    def model(self) -> str | None:
        """The pretrained model whose tokenizer it is."""
        return self.kind.removeprefix("model:") if self.kind.startswith("model:") else None

    def check(self) -> None:
        """Raise LabError for a byte-pair vocabulary without room for the 256 bytes."""
        if self.kind == "bpe" and self.vocab_size < 256:
            what = f"--tokenizer.vocab-size {self.vocab_size} is out of range"
            raise LabError(f"{what}: a byte-pair vocabulary starts from 256 bytes. Pass 256 or more.")


class Tokenizer(ABC):
    """Turns text into token ids and back."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of distinct ids; they run from 0."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""
        return text_hash(self.to_json())

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint16 where the vocabulary fits and else uint32, shape (tokens,)."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the tokenizer as JSON, for `from_json`."""


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """One token per character.

    Args:
        characters: the vocabulary, distinct and sorted.
        unknown: whether one more id stands for every other character; without it they are refused.
    """

    characters: str
    unknown: bool = False

    @classmethod
    def learn(cls, text: str, held_out: str | None = "") -> CharTokenizer:
        """Take the characters of `text`; add an unknown id if `held_out` has others or is None (unknown)."""
        characters = set(text)
        unknown = held_out is None or not characters.issuperset(held_out)
        return cls("".join(sorted(characters)), unknown)

    @property
    def vocab_size(self) -> int:
        """Distinct characters, and the unknown id if there is one."""
        return len(self.characters) + self.unknown

    @cached_property
    def _points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Return one id per character.

        Raises:
            LabError: for a character outside the vocabulary, if it has no unknown id.
        """
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), max(len(self._points) - 1, 0))
        strange = self._points[ids] != points if len(self._points) else np.ones(len(points), bool)
        if strange.any() and not self.unknown:
            what = f"character {text[int(strange.argmax())]!r} is not one of the {self.vocab_size} known"
            raise LabError(f"{what}. Leave it out, or train with --tokenizer.kind byte.")
        ids[strange] = len(self.characters)
        return ids.astype(id_type(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the characters of ids."""
        symbols = self.characters + UNKNOWN * self.unknown
        return "".join(symbols[i] for i in ids)

    def to_json(self) -> str:
        """Return the vocabulary as JSON."""
        return json.dumps({"kind": "char", "characters": self.characters, "unknown": self.unknown})


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8; any text, nothing to learn."""

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> np.ndarray:
        """Return one id per byte."""
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of bytes; bytes that are not UTF-8 become the replacement character."""
        return bytes(map(int, ids)).decode(errors="replace")

    def to_json(self) -> str:
        """Return the kind as JSON."""
        return json.dumps({"kind": "byte"})


@dataclass(frozen=True)
class BpeTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, such as byte-level byte pairs.

    Args:
        serialized: the content of its tokenizer.json.
    """

    serialized: str

    @classmethod
    def learn(cls, text: str, vocab_size: int) -> BpeTokenizer:
        """Learn byte pairs.

        "Neural Machine Translation of Rare Words with Subword Units", Sennrich, Haddow and Birch, 2016.
        """
        model = _byte_level(tokenizers.models.BPE())
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        model.train_from_iterator(_chunks(text), trainer)
        return cls(model.to_str())

    @classmethod
    def read(cls, path: Path) -> BpeTokenizer:
        """Read a tokenizer.json, or a folder with one or with the two files of a GPT-2 vocabulary.

        Raises:
            LabError: if there is none or it is damaged.
        """
        try:
            for names in GPT2_FILES:
                vocabulary, merges = (path / name for name in names)
                if vocabulary.is_file() and merges.is_file():
                    model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
                    return cls(_byte_level(model).to_str())
            file = path / "tokenizer.json" if path.is_dir() else path
            return cls(tokenizers.Tokenizer.from_file(str(file)).to_str())
        except Exception as error:  # `tokenizers` raises Exception itself.
            what = f"--tokenizer.kind '{path}' holds no tokenizer that can be read ({error})"
            raise LabError(f"{what}. Pass a tokenizer.json, or a folder with vocab.json and merges.txt.") from error

    @cached_property
    def _model(self) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self.serialized)
        model.no_truncation()  # A published tokenizer.json may cut texts to its model's length, or pad them.
        model.no_padding()
        return model

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; fewer than were asked for if the text has fewer pairs."""
        return self._model.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, encoded in chunks of CHUNK characters."""
        encoded = self._model.encode_batch(list(_chunks(text)), add_special_tokens=False)
        parts = [np.asarray(chunk.ids, id_type(self.vocab_size)) for chunk in encoded]
        return np.concatenate([np.empty(0, id_type(self.vocab_size)), *parts])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Return the tokenizer.json inside of JSON."""
        return json.dumps({"kind": "bpe", "tokenizer": json.loads(self.serialized)}, ensure_ascii=False)


def build_tokenizer(config: TokenizerConfig, text: str, held_out: str | None, cache: Path | None = None) -> Tokenizer:
    """Make the tokenizer of a corpus, learning from `text` what has to be learned.

    Args:
        config: what to make; auto means char.
        text: training text.
        held_out: validation text, whose characters must be encodable; None if it is not known in full.
        cache: folder that keeps learned byte pairs; None for the user's cache.

    Raises:
        LabError: for an unknown kind or a tokenizer file that cannot be read.
    """
    config.check()
    if config.kind in ("auto", "char"):
        return CharTokenizer.learn(text, held_out)
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind == "bpe":
        return _learn_cached(text, config.vocab_size, cache or cache_folder())
    if config.model is not None:
        return BpeTokenizer(load_tokenizer(config.model).backend_tokenizer.to_str())
    path = Path(os.path.expanduser(config.kind))
    if os.path.exists(path):
        return BpeTokenizer.read(path)
    raise LabError(f"--tokenizer.kind '{config.kind}' does not exist. Pass auto, char, byte, bpe or a path.")


def from_json(text: str) -> Tokenizer:
    """Make the tokenizer that `to_json` wrote.

    Raises:
        LabError: for anything else.
    """
    try:
        data = json.loads(text)
        if data["kind"] == "char":
            return CharTokenizer(data["characters"], data["unknown"])
        return BpeTokenizer(json.dumps(data["tokenizer"])) if data["kind"] == "bpe" else ByteTokenizer()
    except (ValueError, TypeError, KeyError) as error:
        raise LabError(f"not a tokenizer of asgo: {error!r}. Pass what to_json wrote.") from error


def id_type(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type for ids of a vocabulary: uint16 or uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def text_hash(text: str) -> str:
    """Return the sha256 of a text as hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _learn_cached(text: str, vocab_size: int, cache: Path) -> BpeTokenizer:
    key = text_hash(f"bpe {vocab_size} {CHUNK} {tokenizers.__version__} {text_hash(text)}")
    file = cache / "tokenizers" / f"{key}.json"
    try:
        return BpeTokenizer(tokenizers.Tokenizer.from_file(str(file)).to_str())
    except Exception:  # Not there, or damaged: learn again.
        learned = BpeTokenizer.learn(text, vocab_size)
        write_cached(file, lambda opened: opened.write(learned.serialized.encode()))
        return learned


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
    return tokenizer


def _chunks(text: str) -> Iterator[str]:
    return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.dtype("<u4"))
