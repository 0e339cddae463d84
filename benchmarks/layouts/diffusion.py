"""diffusers: small models of the transformers and UNets that can be made small and run without files."""

from __future__ import annotations

import collections
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import diffusers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from benchmarks.layouts.trace import Rows, Table, time_limit, trace

SECONDS = 20
WIDTH = 48
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_layers", "num_single_layers", "depth", "num_refiner_layers", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "heads", "n_heads", "num_kv_heads", "kv_heads"), 4),
    **dict.fromkeys(("attention_head_dim", "head_dim", "attention_head_size"), 12),
    **dict.fromkeys(("num_cross_attention_heads",), 4),
    **dict.fromkeys(("cross_attention_head_dim",), 12),
    **dict.fromkeys(("hidden_size", "dim", "inner_dim", "caption_projection_dim", "cross_attention_dim"), WIDTH),
    **dict.fromkeys(("joint_attention_dim", "text_embed_dim", "text_dim", "caption_channels", "cap_feat_dim"), WIDTH),
    **dict.fromkeys(("pooled_projection_dim", "text_embed_dim_pooled"), WIDTH),
    **dict.fromkeys(("ffn_dim", "intermediate_size", "ff_inner_dim"), 80),
    **dict.fromkeys(("sample_size", "sample_width", "sample_height"), 8),
    **dict.fromkeys(("num_vector_embeds", "num_embeds_ada_norm"), 20),
    "axes_dims_rope": (4, 4, 4),
    "axes_dim": (4, 4, 4),
    "rope_axes_dim": (4, 4, 4),
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""Arguments of constructors that are set, if there is a default to replace."""


def small(kind: type[nn.Module]) -> nn.Module:
    """A small model of a class."""
    parameters = inspect.signature(kind.__init__).parameters
    given = {name: SMALL[name] for name in parameters if name in SMALL and parameters[name].default is not None}
    torch.manual_seed(0)
    return kind(**given).eval()


def inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What a model may take: images, videos or tokens, with a text and a time."""
    config: Any = model.config
    channels = getattr(config, "in_channels", None) or 4
    taken = inspect.signature(model.forward).parameters
    widths = [
        getattr(config, name, None) for name in ("joint_attention_dim", "cross_attention_dim", "caption_channels")
    ]
    width = next((value for value in widths if isinstance(value, int)), WIDTH)
    text = torch.randn(1, 6, width)
    images = (torch.randn(1, channels, 8, 8), torch.randn(1, channels, 2, 8, 8), torch.randn(1, 16, channels))
    times = (torch.tensor([1]), torch.tensor([1.0]))
    for image, time, ids in itertools.product(images, times, (torch.zeros(16, 3), torch.zeros(1, 16, 3))):
        known: dict[str, Tensor | bool] = {
            "sample": image,
            "hidden_states": image,
            "encoder_hidden_states": text,
            "timestep": time,
            "pooled_projections": torch.randn(1, getattr(config, "pooled_projection_dim", None) or WIDTH),
            "img_ids": ids,
            "txt_ids": torch.zeros(*ids.shape[:-2], 6, 3),
            "guidance": torch.ones(1),
            "class_labels": torch.tensor([1]),
            "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
            "resolution": torch.tensor([[8.0, 8.0]]),
            "aspect_ratio": torch.ones(1, 1),
        }
        yield {name: value for name, value in known.items() if name in taken}


def run(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Rows]]:
    """A small model with the traces of the first input that it takes."""
    with time_limit(SECONDS):
        model, error = small(kind), RuntimeError("no input fits")
        for given in inputs(model):
            try:
                return model, trace(model, lambda given=given: model(**given))
            except Exception as failed:
                error = failed
    raise error


def diffusers_table(*chosen: str) -> None:
    """Print the table of these classes, by default all that run."""
    table, failed, ran = Table(), collections.Counter[str](), 0
    names = [
        name for name in dir(diffusers) if name.endswith(("Transformer2DModel", "Transformer3DModel", "Transformer"))
    ]
    names += [name for name in dir(diffusers) if name.endswith(("TransformerModel", "UNet2DConditionModel"))]
    for name in chosen or sorted(set(names)):
        try:
            table.add(name, *run(getattr(diffusers, name)))
            ran += 1
        except Exception as error:
            failed[type(error).__name__] += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:90]!r}", file=sys.stderr)
    print(f"\ndiffusers {diffusers.__version__}, torch {torch.__version__}: {ran} classes ran.")
    print(f"Weights: {dict(table.counts)}. Not built or not run here: {dict(failed)}.")
