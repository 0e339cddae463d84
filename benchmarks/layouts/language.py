"""litgpt: every distinct form of its configurations, small."""

from __future__ import annotations

import collections
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import litgpt  # pyright: ignore[reportMissingImports]
import torch
from litgpt.config import name_to_config  # pyright: ignore[reportMissingImports]

from benchmarks.layouts.trace import Table, trace

HEAD = 8
"""Rows of a head in the small models."""


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same numbers of queries for a key, ratio of widths and kind of MLP, in one small layer."""
    heads = config["n_head"]
    groups, size = config["n_query_groups"], config["head_size"]
    shared = heads // groups
    kept = {1: 1, heads: 4}.get(groups, 2) if shared > 1 else 4
    n_head = kept * (4 if groups == 1 else shared)
    ratio = config["n_embd"] / (heads * size)
    changed = {
        "n_layer": 1,
        "n_head": n_head,
        "n_query_groups": kept,
        "head_size": HEAD,
        "n_embd": max(8, 8 * round(ratio * n_head * HEAD / 8)),
        "intermediate_size": 88,
        "block_size": 16,
        "vocab_size": 60,
        "padded_vocab_size": 64,
    }
    few = {"n_expert": 2, "n_expert_per_token": 2, "moe_intermediate_size": 24, "sliding_window_indices": [0]}
    return config | changed | {name: value for name, value in few.items() if config.get(name)}


def litgpt_table() -> None:
    """Print one row for every distinct form, named after the first configuration that has it."""
    forms: dict[str, list[str]] = {}
    configs = {name: asdict(litgpt.Config.from_name(name)) for name in name_to_config}
    for name, config in configs.items():
        forms.setdefault(repr([small(config).get(key) for key in FORM]), []).append(name)
    table, failed = Table(), collections.Counter[str]()
    for names in forms.values():
        try:
            torch.manual_seed(0)
            model = litgpt.GPT(litgpt.Config(**small(configs[names[0]]))).eval()
            table.add(f"{names[0]} ({len(names)})", model, trace(model, lambda m=model: m(torch.arange(6)[None])))
        except Exception as error:
            failed[type(error).__name__] += 1
            print(f"{names[0]}: {type(error).__name__}: {str(error)[:90]!r}", file=sys.stderr)
    print(
        f"\nlitgpt {version('litgpt')}, torch {torch.__version__}: {len(configs)} configurations, of which ",
        end="",
    )
    print(f"{len(forms)} forms; the number behind a name is that of the configurations with its form.")
    print(f"Weights: {dict(table.counts)}. Not built or not run here: {dict(failed)}.")


FORM = ("n_head", "n_query_groups", "n_embd", "mlp_class_name", "parallel_residual", "norm_qk", "n_expert", "bias")
"""What makes two small configurations different forms."""
