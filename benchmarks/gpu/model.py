"""GPT-2 over bytes, in plain torch: queries, keys and values apart, so that every optimizer sees the same matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Args:
        layers: blocks.
        width: of the residual stream.
        heads: per block.
        context: bytes that it sees.
    """

    layers: int
    width: int
    heads: int
    context: int


GPT2 = Size(12, 768, 12, 1024)
"""The 124M model; over bytes, its embedding has 0.2M of the 39M numbers that it has over tokens."""
TINY = Size(2, 32, 2, 32)


class Attention(nn.Module):
    """Causal attention."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size.width, size.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each after a normalisation."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same."""
        x = x + self.attention(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The model; its output layer is its embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.ln = nn.LayerNorm(size.width)
        self.apply(_init)
        for block in self.blocks:
            for layer in (block.attention.out_proj, block.down):  # pyright: ignore[reportAttributeAccessIssue]
                nn.init.normal_(layer.weight, std=0.02 / (2 * size.layers) ** 0.5)  # pyright: ignore

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss in nats of predicting every byte but the first of ``(batch, time + 1)``."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln(x), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def make_model(size: Size, seed: int, device: torch.device) -> GPT:
    """The model of a seed, the same on every device."""
    torch.manual_seed(seed)
    return GPT(size).to(device)
