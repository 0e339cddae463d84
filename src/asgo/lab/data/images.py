"""Small images with ten classes: Fashion-MNIST where its files are, and scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from asgo.lab.data.cache import cache_folder
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.data.rows import RowBatches, RowData, Rows
from asgo.lab.data.sampling import Draw
from asgo.lab.errors import LabError
from asgo.lab.packages import need

SIDE, CLASSES = 28, 10
SPLIT_SEED = 0
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in three parts that share no image.

    Inputs are ``(images, 1, 28, 28)``, standardised by mean and spread of the training images; targets are classes.

    Args:
        train: for training.
        validation: for choosing learning rates.
        test: for the final errors.
    """

    train: Rows
    validation: Rows
    test: Rows


def open_images(config: CorpusConfig, draw: Draw) -> RowData:
    """The data of a run on images; validation images are drawn from those for training.

    Raises:
        LabError: for files or packages that are not there.
    """
    folder = Path(config.data_files).expanduser() if config.data_files else fashion_mnist_folder()
    images = load_images(config.name, folder, config.validation_fraction)
    parts = (images.train, images.validation, images.test)
    digest = hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for part in parts for tensor in (part.inputs, part.targets))
    )
    sizes = (
        f"{len(images.train):,} training, {len(images.validation):,} validation and {len(images.test):,} test images"
    )
    fingerprint = digest.hexdigest()
    batches = RowBatches(images.train, replace(draw, block_size=1, fingerprint=fingerprint))
    description = f"{config.name}: {sizes}, {CLASSES} classes"
    return RowData(batches, images.validation, CLASSES, fingerprint, description, images.test)


def has_fashion_mnist(folder: Path) -> bool:
    """Whether Fashion-MNIST is in a folder."""
    return _find(folder, "train-images-idx3-ubyte") is not None


def fashion_mnist_folder() -> Path:
    """The folder of the Debian package, else fashion-mnist in the user's cache."""
    return FASHION_MNIST if has_fashion_mnist(FASHION_MNIST) else cache_folder() / "fashion-mnist"


@lru_cache(maxsize=1)
def load_images(name: str, folder: Path, held_out: float, most: int | None = None) -> Images:
    """A data set, its images for validation drawn at random from those for training.

    Args:
        name: fashion-mnist or digits.
        folder: where Fashion-MNIST is.
        held_out: share of the training images that are for validation, 5,000 at most.
        most: most training images.

    Raises:
        LabError: for files or packages that are not there.
    """
    images, labels, tests = _fashion(folder) if name == "fashion-mnist" else _digits()
    rest = len(images) - tests
    order = np.random.default_rng(SPLIT_SEED).permutation(rest)
    validation = max(1, min(5000, int(rest * held_out)))
    train = order[validation:][:most]
    parts = (train, order[:validation], np.arange(rest, len(images)))
    mean, spread = images[train].mean(), images[train].std()
    return Images(*(_part((images[rows] - mean) / spread, labels[rows]) for rows in parts))


def _part(images: np.ndarray, labels: np.ndarray) -> Rows:
    scaled = torch.from_numpy(images)[:, None]
    if scaled.shape[-1] != SIDE:
        scaled = F.interpolate(scaled, size=(SIDE, SIDE), mode="bilinear")
    return Rows(scaled, torch.from_numpy(labels.astype(np.int64)))


def _fashion(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """All images, the 10,000 of the test set last."""
    parts = [
        (_read(folder, f"{part}-images-idx3-ubyte"), _read(folder, f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images.astype(np.float32), labels, len(parts[1][1])


def _read(folder: Path, name: str) -> np.ndarray:
    """An array in the IDX format: two zeros, type 8 for bytes, the number of axes, their lengths, the bytes."""
    path = _find(folder, name)
    if path is None:
        raise LabError(
            f"fashion-mnist has no file {name} in {folder}: install the Debian package dataset-fashion-mnist, or name "
            "the folder of its four files."
        )
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    lengths = np.frombuffer(content, ">u4", axes, 4).tolist() if axes else []
    if not axes or len(content) != 4 + 4 * axes + int(np.prod(lengths)):
        raise LabError(f"{path} is not an IDX file of bytes, or it was cut short: fetch it again.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(lengths)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _digits() -> tuple[np.ndarray, np.ndarray, int]:
    """8 x 8 images, a fifth of them last for testing."""
    datasets = need("sklearn.datasets", "the data set digits", "pip install 'asgo[experiments]'")
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    return pixels[order].reshape(-1, 8, 8).astype(np.float32), labels[order], len(labels) // 5
