"""Where text comes from: Shakespeare, Python's own help, files, or a corpus of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

from asgo.lab.config.ranges import Range
from asgo.lab.data.pinned import DOCUMENT_BREAK, OTHERWISE, PINNED, read_bytes
from asgo.lab.errors import LabError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".rs", ".js", ".java")
"""The files of a folder that are read."""

BLOCKS = Range(1, meaning="a number of blocks")

IMAGE_CORPORA = ("fashion-mnist", "digits")

HUB_CORPORA = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
}
"""Short names of hub corpora: dataset and configuration."""


@dataclass(frozen=True)
class CorpusConfig:
    """Which text to learn from and which part of it to hold out.

    Args:
        name: shakespeare, botocore, pydoc, the path of a text file or folder, openwebtext, wikitext-2, fineweb, or
            hub:OWNER/NAME[:CONFIG]; hub:json, hub:text and hub:parquet read the local data_files. A path that ends in
            .jsonl is one of prompts and responses. fashion-mnist and digits are images.
        split: hub corpora: the split to read.
        text_field: hub corpora: the field of a row that holds the document.
        data_files: hub corpora: path or glob of the files to read, such as part-*.jsonl with hub:json;
            fashion-mnist: the folder of its four files, if not the Debian package's.
        streaming: hub corpora: read documents as training needs them; otherwise the whole split first.
        validation_fraction: the last part of the text, by characters, that is held out, or of the examples or
            training images in an order drawn once; not used by streams.
        validation_characters: streams: the leading documents that together hold so many are held out.
        shuffle_blocks: streams: blocks are drawn at random from a pool of so many, at least one batch.
    """

    name: str = "shakespeare"
    split: str = "train"
    text_field: str = "text"
    data_files: str | None = None
    streaming: bool = True
    validation_fraction: float = 0.1
    validation_characters: Annotated[int, Range(1, meaning="a number of characters")] = 1_000_000
    shuffle_blocks: Annotated[int, BLOCKS] = 1024

    @property
    def hub(self) -> tuple[str, str | None] | None:
        """Dataset and configuration for `datasets.load_dataset`, None for a local corpus."""
        if self.name in HUB_CORPORA:
            return HUB_CORPORA[self.name]
        if not self.name.startswith("hub:"):
            return None
        dataset, _, configuration = self.name.removeprefix("hub:").partition(":")
        return dataset, configuration or None

    @property
    def images(self) -> bool:
        """Whether the corpus is images with classes and not text."""
        return self.name in IMAGE_CORPORA

    @property
    def instructions(self) -> bool:
        """Whether the corpus is prompts with responses."""
        return self.name.lower().endswith(".jsonl") and self.hub is None

    @property
    def streams(self) -> bool:
        """Whether the corpus is read document by document during training."""
        return self.streaming and self.hub is not None

    def check(self) -> None:
        """Raise LabError for a fraction outside (0, 1)."""
        if not 0 < self.validation_fraction < 1:
            what = f"--corpus.validation-fraction {self.validation_fraction} is out of range"
            raise LabError(f"{what}: pass a number between 0 and 1, such as 0.1.")


def read_text(config: CorpusConfig) -> str:
    """Read the whole text of a corpus; documents and files are joined with an empty line.

    Raises:
        LabError: if the corpus is missing, empty, not text, cannot be read or cannot be fetched.
    """
    if config.name in PINNED:
        return PINNED[config.name].read()
    if config.name == "pydoc":
        return DOCUMENT_BREAK.join(topics[key] for key in sorted(topics))
    if config.hub is not None:
        text = DOCUMENT_BREAK.join(_documents(config, load_hub(config, streaming=False)))
    else:
        text = _read_path(config.name)
    if not text.strip():
        raise LabError(f"corpus '{config.name}' is empty. Pass --corpus.name with a corpus that has text.")
    return text


def _read_path(name: str) -> str:
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return DOCUMENT_BREAK.join(read_file(file) for file in _text_files(path))
    if os.path.isfile(path):
        return read_file(path)
    known = ", ".join([*PINNED, "pydoc", *HUB_CORPORA, *IMAGE_CORPORA])
    state = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
    raise LabError(f"corpus '{name}' {state}. Pass one of {known}, hub:OWNER/NAME, or a text file or folder.")


def _text_files(folder: Path) -> list[Path]:
    """List the files below a folder that end in TEXT_SUFFIXES by path; hidden ones are left out."""

    def refuse(error: OSError) -> None:
        raise LabError(f"cannot read the folder '{error.filename}': {error.strerror}. Check its permissions.")

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in files if not name.startswith(".")]
        found.extend(Path(place, name) for name in visible if name.lower().endswith(TEXT_SUFFIXES))
    if not found:
        raise LabError(f"folder '{folder}' has no text files. Text files end in {', '.join(TEXT_SUFFIXES)}.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_file(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        LabError: if it is not, or cannot be read.
    """
    raw = read_bytes(path)
    advice = "Convert it to UTF-8 or leave it out."
    if b"\0" in raw:
        raise LabError(f"'{path}' is not text: byte {raw.index(0)} is zero. {advice}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"'{path}' is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}"
        raise LabError(f"{what}. {advice}") from error


def load_hub(config: CorpusConfig, streaming: bool) -> Iterable[dict[str, Any]]:
    """Open a split of a hub corpus, or of local files in a hub format, by `datasets.load_dataset`.

    Raises:
        LabError: if `datasets` cannot find, reach or read it.
    """
    from datasets import load_dataset  # noqa: PLC0415 (takes a second, and only hub corpora need it)

    path, name = config.hub or ("", None)
    options = {"split": config.split, "data_files": config.data_files, "streaming": streaming}
    try:
        return load_dataset(path, name, **options)
    except Exception as error:
        if "scripts are no longer supported" not in str(error):
            raise _unreadable(config, error) from error
    try:  # An old corpus that is a program: the hub keeps a converted copy of it on this branch.
        return load_dataset(path, name, revision="refs/convert/parquet", **options)
    except Exception as error:
        raise _unreadable(config, error) from error


def _unreadable(config: CorpusConfig, error: Exception) -> LabError:
    # The hub's client raises errors of several libraries, so every Exception is turned into one line here.
    reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    files = f"the files '{config.data_files}', " if config.data_files else ""
    advice = f"Check the name, {files}the split '{config.split}' and the connection, {OTHERWISE}"
    return LabError(f"cannot read corpus '{config.name}' with datasets: {reason}. {advice}")


def _documents(config: CorpusConfig, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    try:
        for row in rows:
            if config.text_field not in row:
                what = f"rows of corpus '{config.name}' have no field '{config.text_field}'"
                raise LabError(f"{what}: pass --corpus.text-field with one of {', '.join(row)}.")
            if row[config.text_field]:
                yield str(row[config.text_field])
    except LabError:
        raise
    except Exception as error:
        raise _unreadable(config, error) from error


class DocumentStream:
    """The documents of a hub corpus in their own order, with an exact position to save and restore."""

    def __init__(self, config: CorpusConfig) -> None:
        """Open the corpus of `config`; nothing is read yet."""
        self.config = config
        self._rows: Any = load_hub(config, streaming=True)
        self._documents = _documents(config, self._rows)
        self._loaded: dict[str, Any] | None = None

    def read(self) -> str | None:
        """Return the next document followed by an empty line, None after the last one."""
        self._loaded = None
        document = next(self._documents, None)
        return None if document is None else document + DOCUMENT_BREAK

    def take(self, characters: int) -> str:
        """Return the next whole documents that together hold so many characters, fewer at the end."""
        taken: list[str] = []
        while characters > 0 and (document := self.read()) is not None:
            taken.append(document)
            characters -= len(document)
        return "".join(taken)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document read, as plain data."""
        # `datasets` goes to a loaded position only with the next row, and reports the previous one until then.
        return self._rows.state_dict() if self._loaded is None else deepcopy(self._loaded)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned."""
        self._loaded = deepcopy(state)
        self._rows.load_state_dict(deepcopy(state))
        self._documents = _documents(self.config, self._rows)
