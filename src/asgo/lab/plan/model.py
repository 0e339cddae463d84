"""The model that is planned for: by name, by folder, or by its name on the Hugging Face Hub; never with weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asgo.lab.config import ModelConfig
from asgo.lab.errors import LabError
from asgo.lab.models import PRESETS, build_model
from asgo.lab.packages import need

GPT2_VOCABULARY, GPT2_BLOCK = 50257, 1024
BLOCK = 4096
"""Longest sequence unless the model's own is shorter."""


def _llama(layers: int, width: int, inner: int, heads: int, kv_heads: int, tied: bool) -> Any:
    config = _transformers().LlamaConfig
    return config(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _olmoe() -> Any:
    """64 experts of width 1,024 in each of 16 layers of width 2,048; what is not named is what transformers takes."""
    config = _transformers().OlmoeConfig
    return config(vocab_size=50_304, intermediate_size=1024, bos_token_id=None, eos_token_id=None, pad_token_id=None)


PUBLISHED: dict[str, Callable[[], Any]] = {
    "llama-1b": partial(_llama, 16, 2048, 8192, 32, 8, True),
    "llama-8b": partial(_llama, 32, 4096, 14_336, 32, 8, False),
    "llama-70b": partial(_llama, 80, 8192, 28_672, 64, 8, False),
    "olmoe-7b": _olmoe,
}
"""Shapes as published: "The Llama 3 Herd of Models" (2024), 1B from Llama 3.2; "OLMoE: Open Mixture-of-Experts Language
Models" (2024)."""


@dataclass(frozen=True)
class Subject:
    """A model on the meta device.

    Args:
        name: as it was asked for.
        model: the module; its tensors take no memory.
        block: tokens of a sequence.
        heads: of queries, and of keys and values; 0 where the configuration does not tell.
        kv_heads: of keys and values.
        tp_plan: how tensor parallel cuts each module, by name with ``*`` for numbers; empty where there is no plan.
    """

    name: str
    model: nn.Module
    block: int
    heads: int
    kv_heads: int
    tp_plan: dict[str, str]

    @property
    def parameters(self) -> int:
        """How many trainable numbers it has."""
        return sum(param.numel() for param in self.model.parameters() if param.requires_grad)

    @property
    def tp_sizes(self) -> list[int]:
        """The numbers of ranks over which tensor parallel can cut it."""
        if not self.tp_plan or not self.heads:
            return [1]
        return [t for t in range(1, self.kv_heads + 1) if self.heads % t == 0 and self.kv_heads % t == 0]


def load(name: str, block: int | None) -> Subject:
    """The model called `name`, without memory.

    Args:
        name: a preset, a published shape, a folder or file of a configuration, or OWNER/NAME on the Hub.
        block: tokens of a sequence; None: the model's own longest, at most 4,096.

    Raises:
        LabError: for a model that does not exist or cannot be read, or a block longer than the model's.
    """
    if name in PRESETS:
        with torch.device("meta"):
            model = build_model(ModelConfig(preset=name), GPT2_VOCABULARY, GPT2_BLOCK, seed=0)  # pyright: ignore[reportArgumentType]
    else:
        config = PUBLISHED[name]() if name in PUBLISHED else _read(name)
        model = _empty(name, config)
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None) or BLOCK
    if block is not None and not 1 <= block <= longest:
        raise LabError(f"--block-size {block} is out of range: {name} takes 1 to {longest} tokens.")
    heads = getattr(config, "num_attention_heads", None) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Subject(name, model, block or min(BLOCK, longest), heads, kv_heads, _tp_plan(model))


def _transformers() -> Any:
    return need("transformers", "asgo plan", "pip install 'asgo[lab]'")


def _read(name: str) -> Any:
    """A configuration from a folder, a file or the Hub."""
    known = f"choose from {', '.join((*PRESETS, *PUBLISHED))}, a folder with config.json, or OWNER/NAME on the Hub"
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


def _empty(name: str, config: Any) -> nn.Module:
    """The model of a configuration on the meta device: a causal language model, or else the bare model."""
    transformers = _transformers()
    error: Exception | None = None
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            with torch.device("meta"):
                return kind.from_config(config)
        except (ValueError, TypeError, ImportError) as failure:
            error = failure
    raise LabError(f"model {name!r} ({type(config).__name__}) cannot be built: {error}. Pass another.") from error


def _tp_plan(model: nn.Module) -> dict[str, str]:
    """What transformers says about cutting each module; no plan for a model that has none."""
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    return {str(name): str(kind) for name, kind in plan.items()}


def flops_per_token(subject: Subject) -> tuple[float, str]:
    """Operations of forward and backward for each token, and how they were counted.

    `torch.utils.flop_counter` counts the products of one sequence on the meta device. It counts attention in full,
    without what a causal kernel leaves out. A model that cannot run there (mixtures of experts decide by values) is
    counted as 6 for each weight in use and 12 x layers x width x tokens for attention.
    """
    tokens = torch.zeros(1, subject.block, dtype=torch.long, device="meta")
    seen = torch.ones(1, 1, subject.block, subject.block, dtype=torch.bool, device="meta")  # else its mask reads values
    try:
        with FlopCounterMode(display=False) as counter:
            output = subject.model(input_ids=tokens, attention_mask=seen)
            output[0].float().sum().backward()
        return counter.get_total_flops() / subject.block, "counted by torch.utils.flop_counter"
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError):
        return _formula(subject), "6 operations for each weight in use, and attention"
    finally:
        subject.model.zero_grad(set_to_none=True)


def _formula(subject: Subject) -> float:
    config: Any = subject.model.config
    experts = next((v for n in ("num_local_experts", "num_experts", "n_routed_experts") if (v := _int(config, n))), 1)
    share = (_int(config, "num_experts_per_tok") or experts) / experts
    tables = {id(module.weight) for module in subject.model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(subject.model, "get_output_embeddings", lambda: None)()
    tables -= {id(getattr(head, "weight", None))}
    weights = sum(
        p.numel() * (share if p.ndim == 3 and p.shape[0] == experts else 1.0)
        for p in subject.model.parameters()
        if id(p) not in tables
    )
    attention = 12.0 * _int(config, "num_hidden_layers") * _int(config, "hidden_size") * subject.block
    return 6.0 * weights + attention


def _int(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
