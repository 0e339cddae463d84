"""Which images the experiment takes: Fashion-MNIST where it is installed, else scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from asgo.lab.data.images import Images, has_fashion_mnist, load_images

Name = Literal["auto", "fashion-mnist", "digits"]

HELD_OUT = 0.2
"""Most of the training images that choose learning rates; 5,000 at most."""


def resolve(name: Name, folder: Path) -> str:
    """The data set that ``auto`` stands for: Fashion-MNIST if its files are there."""
    return name if name != "auto" else "fashion-mnist" if has_fashion_mnist(folder) else "digits"


def load(name: str, folder: Path, count: int) -> Images:
    """The data set, with at most `count` training images.

    Raises:
        LabError: for files or packages that are not there.
    """
    return load_images(name, folder, HELD_OUT, count)
