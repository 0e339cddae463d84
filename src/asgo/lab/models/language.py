"""Models from a config and a seed: of language, and for small images.

Weights depend on the seed and the shape alone, so that every optimizer of a comparison
starts from the same ones. Losses are means over tokens or images, in nats.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asgo.lab.config.runs import ModelConfig, RunConfig
from asgo.lab.errors import LabError
from asgo.lab.models import architectures
from asgo.lab.models.architectures import IMAGE_FAMILIES, NO_SPECIAL_TOKENS, PRESETS, Shape
from asgo.lab.packages import need
from asgo.lab.pretrained import add_lora, load_model


def shape_of(config: ModelConfig) -> Shape:
    """The preset's shape with the config's own fields over it.

    Raises:
        LabError: for an unknown preset, sizes that do not divide, or fields beside a file that has them all.
    """
    if config.config is not None and replace(config, config=None, preset="demo") != ModelConfig():
        raise LabError(f"--model.config {config.config} says all about the model: leave the other --model flags out.")
    if config.pretrained is not None:
        free = {"pretrained": None, "layers": None, "lora_rank": 0, "dtype": "float32"}
        if replace(config, **free) != ModelConfig():
            raise LabError(
                f"--model.pretrained {config.pretrained} says all about the model: leave the other --model flags out, "
                "but for layers, lora-rank and dtype."
            )
    elif config.lora_rank:
        raise LabError(f"--model.lora-rank {config.lora_rank} is for a model of --model.pretrained: pass one.")
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


def check_model(config: RunConfig) -> None:
    """Refuse a model that does not exist, or that does not fit the corpus.

    Raises:
        LabError: saying which of the two to change.
    """
    family, corpus = shape_of(config.model).family, config.data.corpus
    if (family in IMAGE_FAMILIES) != corpus.images:
        what, fits = ("images", "vit or resnet") if corpus.images else ("text", "gpt2 or llama")
        raise LabError(
            f"--corpus.name {corpus.name} is {what}, which {family} does not read: pass --model.family {fits}."
        )


def _check(shape: Shape) -> None:
    if shape.family == "resnet":
        if shape.width % 2 ** (shape.layers - 1):
            raise LabError(
                f"--model.width {shape.width} cannot be halved {shape.layers - 1} times: a resnet of --model.layers "
                f"{shape.layers} stages has {shape.width} channels in the last one, half as many in each one before."
            )
        return
    if shape.width % shape.heads:
        raise LabError(f"--model.width {shape.width} is not a multiple of --model.heads {shape.heads}: change one.")
    if shape.heads % shape.kv_heads:
        raise LabError(f"--model.kv-heads {shape.kv_heads} does not divide --model.heads {shape.heads}: change one.")
    if shape.family in ("gpt2", "vit") and shape.kv_heads != shape.heads:
        raise LabError(f"--model.kv-heads is for llama: {shape.family} has one key head per query.")
    if shape.family == "llama" and shape.width // shape.heads % 2:
        raise LabError(
            f"--model.width {shape.width} gives {shape.heads} heads of odd size {shape.width // shape.heads}: "
            "llama's rotary positions need an even size."
        )


def build_model(config: ModelConfig, vocab_size: int, block_size: int, seed: int) -> nn.Module:
    """A model with weights drawn from `seed`; the caller's random state is left as it was.

    Args:
        config: shape and dropout.
        vocab_size: number of tokens, or of classes.
        block_size: longest sequence, in tokens.
        seed: seed of the weights.
    """
    shape = shape_of(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.pretrained is not None:
            return _of_pretrained(config, config.pretrained, vocab_size, block_size)
        if config.config is not None:
            model = _of_file(config.config, vocab_size, block_size)
        else:
            model = architectures.build(shape, vocab_size, block_size, config.dropout)
        return model.to(getattr(torch, config.dtype))


def _of_pretrained(config: ModelConfig, name: str, vocab_size: int, block_size: int) -> nn.Module:
    layers = {} if config.layers is None else {"num_hidden_layers": config.layers}
    model: Any = load_model(name, {"dtype": getattr(torch, config.dtype), **layers})
    model.config.use_cache = False
    longest = getattr(model.config, "max_position_embeddings", block_size)
    if longest < block_size:
        raise LabError(f"--model.pretrained {name} reads {longest} tokens, --block-size is {block_size}: pass fewer.")
    known = model.get_input_embeddings().num_embeddings
    if known < vocab_size:
        raise LabError(
            f"--model.pretrained {name} has {known} tokens, its tokenizer {vocab_size}: they do not belong together."
        )
    return add_lora(model, config.lora_rank) if config.lora_rank else model


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
    """Mean cross entropy in nats per token of `targets` (batch, block), already shifted, given `inputs`.

    Of images: per image, `targets` are classes (batch). Targets of -100 do not count.
    """
    return cross_entropy(model(inputs).logits, targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over `targets` other than -100 of minus the logarithm of what `logits` (..., classes) give them, in nats."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def model_fingerprint(model: nn.Module) -> str:
    """A short hash of the architecture's name, every parameter's name and shape, and numbers of each frozen one."""
    text = type(model).__name__ + repr([(name, tuple(p.shape)) for name, p in model.named_parameters()])
    digest = hashlib.sha256(text.encode())
    for param in model.parameters():
        if not param.requires_grad:  # It is not in the checkpoint.
            digest.update(param.detach().flatten()[:1000].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
