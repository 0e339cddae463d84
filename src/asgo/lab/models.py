"""Causal language models of `transformers`, built from a config and a seed, with random weights.

Nothing is downloaded. Weights depend on the seed and the shape alone, so that every optimizer of a comparison
starts from the same ones. Losses are means over tokens, in nats.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asgo.lab.config import ModelConfig, Preset
from asgo.lab.errors import LabError


@dataclass(frozen=True)
class Shape:
    """A model's shape with every field decided; the fields of `ModelConfig`."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    width: int
    tie_embeddings: bool


PRESETS: dict[Preset, Shape] = {
    "tiny": Shape("gpt2", 2, 2, 2, 32, True),
    "demo": Shape("gpt2", 4, 4, 4, 128, True),
    "small": Shape("gpt2", 6, 6, 6, 384, True),
    "gpt2-124m": Shape("gpt2", 12, 12, 12, 768, True),
    "llama-tiny": Shape("llama", 2, 4, 2, 32, False),
    "llama-demo": Shape("llama", 4, 4, 2, 128, False),
    "llama-124m": Shape("llama", 12, 12, 4, 768, False),
}


def shape_of(config: ModelConfig) -> Shape:
    """The preset's shape with the config's own fields over it.

    Raises:
        LabError: for an unknown preset, sizes that do not divide, or fields beside a file that has them all.
    """
    if config.config is not None and replace(config, config=None, preset="demo") != ModelConfig():
        raise LabError(f"--model.config {config.config} says all about the model: leave the other --model flags out.")
    if config.preset not in PRESETS:
        raise LabError(f"model preset {config.preset!r} does not exist: choose from {', '.join(PRESETS)}.")
    start = PRESETS[config.preset]
    names = ("family", "layers", "heads", "kv_heads", "width", "tie_embeddings")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.heads is not None and config.kv_heads is None:
        given["kv_heads"] = config.heads
    shape = replace(start, **given)
    _check(shape)
    return shape


def _check(shape: Shape) -> None:
    if shape.width % shape.heads:
        raise LabError(f"--model.width {shape.width} is not a multiple of --model.heads {shape.heads}: change one.")
    if shape.heads % shape.kv_heads:
        raise LabError(f"--model.kv-heads {shape.kv_heads} does not divide --model.heads {shape.heads}: change one.")
    if shape.family == "gpt2" and shape.kv_heads != shape.heads:
        raise LabError("--model.kv-heads is for llama: gpt2 has one key head per query.")
    if shape.family == "llama" and shape.width // shape.heads % 2:
        raise LabError(
            f"--model.width {shape.width} gives {shape.heads} heads of odd size {shape.width // shape.heads}: "
            "llama's rotary positions need an even size."
        )


def build_model(config: ModelConfig, vocab_size: int, block_size: int, seed: int) -> nn.Module:
    """A causal LM with weights drawn from `seed`; the caller's random state is left as it was.

    Args:
        config: shape and dropout.
        vocab_size: number of tokens.
        block_size: longest sequence, in tokens.
        seed: seed of the weights.
    """
    shape = shape_of(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.config is not None:
            return _of_file(config.config, vocab_size, block_size)
        return _FAMILIES[shape.family](shape, config.dropout, vocab_size, block_size)


def _gpt2(shape: Shape, dropout: float, vocab_size: int, block_size: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 (takes seconds; --help should not)

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=block_size,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            **_common(shape),
        )
    )


def _llama(shape: Shape, dropout: float, vocab_size: int, block_size: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (takes seconds; --help should not)

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=block_size,
            hidden_size=shape.width,
            # two thirds of GPT-2's 4 x width, because the gated MLP has three matrices instead of two
            intermediate_size=-(-8 * shape.width // (3 * 32)) * 32,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            attention_dropout=dropout,
            **_common(shape),
        )
    )


def _of_file(path: Path, vocab_size: int, block_size: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 (takes seconds; --help should not)

    fixed = {"vocab_size": vocab_size, "use_cache": False, **_NO_TOKENS}
    try:
        if not path.exists():
            raise ValueError("there is no such file")
        found = AutoConfig.from_pretrained(path, local_files_only=True, **fixed)
        longest = getattr(found, "max_position_embeddings", block_size)
        if longest < block_size:
            raise ValueError(f"it reads {longest} tokens, --block-size is {block_size}")
        return AutoModelForCausalLM.from_config(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LabError(
            f"--model.config {path} gives no causal language model: {reason}. Pass a config.json of Hugging Face "
            "with model_type, or a --model.preset."
        ) from error


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "tie_word_embeddings": shape.tie_embeddings,
        "attn_implementation": "sdpa",
        "use_cache": False,
        **_NO_TOKENS,
    }


_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_FAMILIES = {"gpt2": _gpt2, "llama": _llama}


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per token of `targets` (batch, block), already shifted, given `inputs`."""
    logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def model_fingerprint(model: nn.Module) -> str:
    """A short hash of the architecture's name and of every parameter's name and shape."""
    architecture = type(model).__name__.removeprefix("FSDP")  # the same model in shards
    text = architecture + repr([(name, tuple(p.shape)) for name, p in model.named_parameters()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
