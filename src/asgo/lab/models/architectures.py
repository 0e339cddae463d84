"""The one builder of models: shapes by name, and the model of `transformers` that has a shape.

Weights are random, so nothing is downloaded; on the meta device a model takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from asgo.lab.data.images import SIDE
from asgo.lab.packages import need

Family = Literal["gpt2", "llama", "olmoe", "vit", "resnet"]
Preset = Literal[
    "tiny", "demo", "small", "gpt2-124m", "llama-tiny", "llama-demo", "llama-124m", "olmoe-tiny", "vit", "resnet"
]
IMAGE_FAMILIES = ("vit", "resnet")
PATCH = 7
"""Side of a patch of ViT, in pixels."""


@dataclass(frozen=True)
class Shape:
    """The shape of a model.

    Args:
        family: architecture.
        layers: transformer blocks; of a ResNet, stages of one basic block, each with twice the channels of the one
            before.
        heads: of queries.
        kv_heads: of keys and values.
        width: of the residual stream; of a ResNet, channels of the last stage.
        tie_embeddings: whether the embedding is the output head too.
        inner: width of the MLP, or of one expert; None: 4 x width, for llama two thirds of that, because its gated MLP
            has three matrices instead of two.
        experts: of each layer; 0: none.
    """

    family: Family
    layers: int
    heads: int
    kv_heads: int
    width: int
    tie_embeddings: bool
    inner: int | None = None
    experts: int = 0


PRESETS: dict[Preset, Shape] = {
    "tiny": Shape("gpt2", 2, 2, 2, 32, tie_embeddings=True),
    "demo": Shape("gpt2", 4, 4, 4, 128, tie_embeddings=True),
    "small": Shape("gpt2", 6, 6, 6, 384, tie_embeddings=True),
    "gpt2-124m": Shape("gpt2", 12, 12, 12, 768, tie_embeddings=True),
    "llama-tiny": Shape("llama", 2, 4, 2, 32, tie_embeddings=False),
    "llama-demo": Shape("llama", 4, 4, 2, 128, tie_embeddings=False),
    "llama-124m": Shape("llama", 12, 12, 4, 768, tie_embeddings=False),
    "olmoe-tiny": Shape("olmoe", 2, 4, 4, 64, tie_embeddings=False, inner=32, experts=32),
    "vit": Shape("vit", 3, 4, 4, 64, tie_embeddings=False),
    "resnet": Shape("resnet", 3, 1, 1, 64, tie_embeddings=False),
}
"""Shapes that can be trained."""

GPT2_VOCABULARY, GPT2_BLOCK = 50_257, 1024


@dataclass(frozen=True)
class Published:
    """A published model: its shape, its vocabulary and the longest sequence that it reads, in tokens."""

    shape: Shape
    vocab_size: int
    block_size: int


PUBLISHED: dict[str, Published] = {
    "llama-1b": Published(Shape("llama", 16, 32, 8, 2048, tie_embeddings=True, inner=8192), 128_256, 131_072),
    "llama-8b": Published(Shape("llama", 32, 32, 8, 4096, tie_embeddings=False, inner=14_336), 128_256, 131_072),
    "llama-70b": Published(Shape("llama", 80, 64, 8, 8192, tie_embeddings=False, inner=28_672), 128_256, 131_072),
    "olmoe-7b": Published(Shape("olmoe", 16, 16, 16, 2048, tie_embeddings=False, inner=1024, experts=64), 50_304, 4096),
}
"""Shapes as published: "The Llama 3 Herd of Models" (2024), 1B from Llama 3.2; "OLMoE: Open Mixture-of-Experts Language
Models" (2024)."""

NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ACTIVE_EXPERTS = 8
"""Experts that see a token."""


def build(shape: Shape, vocab_size: int, block_size: int, dropout: float = 0.0) -> nn.Module:
    """The causal language model, or classifier of small images, of a shape, with weights from torch's random state.

    Args:
        shape: what it has.
        vocab_size: number of tokens, or of classes.
        block_size: longest sequence, in tokens; images have `SIDE` pixels each way.
        dropout: probability of dropping an activation (llama: an attention weight) while training.
    """
    transformers = need("transformers", "a model", "pip install 'asgo[lab]'")  # takes seconds to import
    if shape.family == "resnet":
        widths = [shape.width >> stage for stage in reversed(range(shape.layers))]
        return resnet(widths, [1] * shape.layers, vocab_size, channels=1, layer_type="basic")
    if shape.family == "vit":
        config = transformers.ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            hidden_size=shape.width,
            intermediate_size=shape.inner or 4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            hidden_dropout_prob=dropout,
            num_labels=vocab_size,
        )
        return transformers.ViTForImageClassification(config)
    common = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "attn_implementation": "sdpa",
        "use_cache": False,
        **NO_SPECIAL_TOKENS,
    }
    if shape.family == "gpt2":
        sizes = {"n_positions": block_size, "n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops, **common))
    sizes = {
        "max_position_embeddings": block_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner or -(-8 * shape.width // (3 * 32)) * 32,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "attention_dropout": dropout,
    }
    if shape.family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **common))
    experts = {"num_experts": shape.experts, "num_experts_per_tok": min(ACTIVE_EXPERTS, shape.experts)}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, **experts, **common))


def resnet(widths: Sequence[int], depths: Sequence[int], classes: int, channels: int, layer_type: str) -> nn.Module:
    """A ResNet that classifies images.

    Args:
        widths: channels of the stages.
        depths: blocks of the stages.
        classes: how many.
        channels: of the images.
        layer_type: of the blocks, basic (whose first stage has the stem's channels) or bottleneck (four times those).
    """
    transformers = need("transformers", "a ResNet", "pip install 'asgo[lab]'")
    stem = widths[0] // (4 if layer_type == "bottleneck" else 1)
    config = transformers.ResNetConfig(
        num_channels=channels,
        embedding_size=stem,
        hidden_sizes=list(widths),
        depths=list(depths),
        layer_type=layer_type,
        num_labels=classes,
    )
    return transformers.ResNetForImageClassification(config)
