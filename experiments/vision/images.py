"""Small images with ten classes: Fashion-MNIST where it is installed, else scikit-learn's digits."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asgo.lab.errors import LabError
from asgo.lab.packages import need

Name = Literal["auto", "fashion-mnist", "digits"]

SIDE = 28
SPLIT_SEED = 0
VALIDATION = 5000
"""Most images for choosing learning rates."""


@dataclass(frozen=True, eq=False)
class Part:
    """Images and their classes.

    Args:
        images: ``(count, 1, 28, 28)``, standardised by mean and spread of the training images.
        labels: ``(count,)``.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in three parts that share no image.

    Args:
        name: which.
        train: for training.
        validation: for choosing learning rates.
        test: for the final errors.
    """

    name: str
    train: Part
    validation: Part
    test: Part


def resolve(name: Name, folder: Path) -> str:
    """The data set that ``auto`` stands for: Fashion-MNIST if its files are there."""
    return name if name != "auto" else "fashion-mnist" if _find(folder, "train-images-idx3-ubyte") else "digits"


@lru_cache(maxsize=1)
def load(name: str, folder: Path, count: int) -> Images:
    """The data set, with at most `count` training images.

    Raises:
        LabError: for files or packages that are not there.
    """
    images, labels, held = _fashion(folder) if name == "fashion-mnist" else _digits()
    rest = len(images) - held
    order = np.random.default_rng(SPLIT_SEED).permutation(rest)
    validation = min(VALIDATION, rest // 5)
    train = order[validation:][:count]
    parts = (train, order[:validation], np.arange(rest, len(images)))
    mean, spread = images[train].mean(), images[train].std()
    return Images(name, *(_part((images[rows] - mean) / spread, labels[rows]) for rows in parts))


def _part(images: np.ndarray, labels: np.ndarray) -> Part:
    scaled = torch.from_numpy(images)[:, None]
    if scaled.shape[-1] != SIDE:
        scaled = F.interpolate(scaled, size=(SIDE, SIDE), mode="bilinear")
    return Part(scaled, torch.from_numpy(labels.astype(np.int64)))


def _fashion(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """All images, the 10,000 of the test set last."""
    parts = [
        (_read(folder, f"{part}-images-idx3-ubyte"), _read(folder, f"{part}-labels-idx1-ubyte")) for part in _PARTS
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images.astype(np.float32), labels, len(parts[1][1])


_PARTS = ("train", "t10k")


def _read(folder: Path, name: str) -> np.ndarray:
    """An array in the IDX format: two zeros, type 8 for bytes, the number of axes, their lengths, the bytes."""
    path = _find(folder, name)
    if path is None:
        raise LabError(
            f"fashion-mnist has no file {name} in {folder}: install the Debian package dataset-fashion-mnist, pass "
            "--folder with its four files, or --data digits."
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
