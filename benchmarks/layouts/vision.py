"""timm: one small model of every file of models."""

from __future__ import annotations

import collections
import sys

import timm  # pyright: ignore[reportMissingImports]
import torch
from torch import nn

from asgo.views.vocabulary import words
from benchmarks.layouts.trace import Rows, Table, time_limit, trace

SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "tiny", "xs", "_b0", "_s0", "_0", "small", "_s", "_18")
"""What small models have in their names, the smallest first."""

SIZES = (64, 96, 128, 224, 256)
"""Images to try, in pixels."""

SECONDS = 60


def smallest(names: list[str]) -> str:
    """The model that is small by its name."""
    return min(names, key=lambda name: (next((i for i, word in enumerate(SMALL) if word in name), 99), len(name), name))


def run(name: str) -> tuple[nn.Module, dict[str, Rows]]:
    """A model with its traces, at the smallest image that it takes."""
    error: Exception = RuntimeError()
    for size in SIZES:
        try:
            with time_limit(SECONDS):
                torch.manual_seed(0)
                model = built(name, size).eval()
                return model, trace(model, lambda m=model, s=size: m(torch.randn(1, 3, s, s)))
        except Exception as failed:
            error = failed
    raise error


def built(name: str, size: int) -> nn.Module:
    """A model for images of this size, if its class can be told, else for any that it takes."""
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:
        return timm.create_model(name)


def has_attention(name: str) -> bool:
    """Whether a model has parameters called like parts of attention or of what stands in its place."""
    with torch.device("meta"):
        parameters = timm.create_model(name).named_parameters()
    found = {word for parameter, _ in parameters for word in words(parameter)}
    return bool(found & {"attn", "attention", "qkv", "qk", "kv", "mixer", "modulation", "queries", "qkvs"})


def timm_table(*names: str) -> None:
    """Print the table of these models, by default of one small model of every file of models with attention."""
    table, failed, ran = Table(), collections.Counter[str](), 0
    files = [found for module in timm.list_modules() if (found := timm.list_models(module=module))]
    for name in names or map(smallest, files):
        try:
            if not names and not has_attention(name):
                continue
            table.add(name, *run(name))
            ran += 1
        except Exception as error:
            failed[type(error).__name__] += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:90]!r}", file=sys.stderr)
    print(f"\ntimm {timm.__version__}, torch {torch.__version__}: {ran} models.")
    print(f"Weights: {dict(table.counts)}. Not built or not run here: {dict(failed)}.")
