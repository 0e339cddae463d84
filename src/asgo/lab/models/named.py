"""Models without weights: by name, by folder, or by their names on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from asgo.lab.errors import LabError
from asgo.lab.models.architectures import (
    GPT2_BLOCK,
    GPT2_VOCABULARY,
    IMAGE_FAMILIES,
    PRESETS,
    PUBLISHED,
    Published,
    build,
)
from asgo.lab.packages import need

TEXT = {name: shape for name, shape in PRESETS.items() if shape.family not in IMAGE_FAMILIES}
KNOWN = {name: Published(shape, GPT2_VOCABULARY, GPT2_BLOCK) for name, shape in TEXT.items()} | PUBLISHED


class NamedModel(NamedTuple):
    """A model on the meta device.

    Args:
        name: as it was asked for.
        module: the model; its tensors take no memory.
        heads: of queries; 0 where the configuration does not tell.
        kv_heads: of keys and values.
        tp_plan: how tensor parallel cuts each module, by name with ``*`` for numbers; empty where there is no plan.
    """

    name: str
    module: nn.Module
    heads: int
    kv_heads: int
    tp_plan: dict[str, str]

    @property
    def tp_sizes(self) -> list[int]:
        """The numbers of ranks over which tensor parallel can cut it."""
        most = self.kv_heads if self.tp_plan and self.heads else 1
        return [t for t in range(1, most + 1) if t == 1 or self.heads % t == self.kv_heads % t == 0]


def load(name: str) -> NamedModel:
    """The model called `name` (preset, published shape, folder, file, or OWNER/NAME on the Hub), without memory.

    Raises:
        LabError: for a model that does not exist or cannot be read.
    """
    config = None if name in KNOWN else _read(name)
    with torch.device("meta"):
        known = KNOWN.get(name)
        module = build(known.shape, known.vocab_size, known.block_size) if known else _of_config(name, config)
    found: Any = module.config
    heads = getattr(found, "num_attention_heads", None) or 0
    kv_heads = getattr(found, "num_key_value_heads", None) or heads
    plan = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None) or {}
    return NamedModel(name, module, heads, kv_heads, {str(where): str(kind) for where, kind in plan.items()})


def _transformers() -> Any:
    return need("transformers", "asgo plan", "pip install 'asgo[lab]'")


def _read(name: str) -> Any:
    """A configuration from a folder, a file or the Hub."""
    known = f"choose from {', '.join(KNOWN)}, a folder with config.json, or OWNER/NAME on the Hub"
    path = Path(name)
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise LabError(f"model {name!r} does not exist: {known}.")
    if path.is_dir() and not (path / "config.json").exists():
        raise LabError(f"model {name!r} is a folder without config.json: {known}.")
    try:
        return _transformers().AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = "cannot be read" if path.exists() else "is no local folder and could not be had from the Hub (offline?)"
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise LabError(f"model {name!r} {what}: {reason}. Otherwise {known}.") from error


def _of_config(name: str, config: Any) -> nn.Module:
    """A causal language model, or else the bare model."""
    transformers, error = _transformers(), None
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            return kind.from_config(config)
        except (ValueError, TypeError, ImportError) as failure:
            error = failure
    raise LabError(f"model {name!r} ({type(config).__name__}) cannot be built: {error}. Pass another.") from error
