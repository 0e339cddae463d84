"""Language models from a config and a seed.

Weights depend on the seed and the shape alone, so that every optimizer of a comparison
starts from the same ones. Losses are means over tokens, in nats.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asgo.lab.config.runs import ModelConfig
from asgo.lab.errors import LabError
from asgo.lab.models import architectures
from asgo.lab.models.architectures import NO_SPECIAL_TOKENS, PRESETS, Shape
from asgo.lab.packages import need


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
        return architectures.build(shape, vocab_size, block_size, config.dropout)


def _of_file(path: Path, vocab_size: int, block_size: int) -> nn.Module:
    transformers = need("transformers", "--model.config", "pip install 'asgo[lab]'")
    fixed = {"vocab_size": vocab_size, "use_cache": False, **NO_SPECIAL_TOKENS}
    try:
        if not path.exists():
            raise ValueError("there is no such file")
        found = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **fixed)
        longest = getattr(found, "max_position_embeddings", block_size)
        if longest < block_size:
            raise ValueError(f"it reads {longest} tokens, --block-size is {block_size}")
        return transformers.AutoModelForCausalLM.from_config(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LabError(
            f"--model.config {path} gives no causal language model: {reason}. Pass a config.json of Hugging Face "
            "with model_type, or a --model.preset."
        ) from error


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
