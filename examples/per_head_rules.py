"""Views written by hand: per-head query and key, a layer left to AdamW, settings for one layer."""

import torch
from torch import Tensor, nn

from asgo import ASGO, Rule, View, report, route
from asgo.views import heads


class Attention(nn.Module):
    """Attention with attribute names that routing does not know, so rules give the views of its weights."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ask, self.find, self.take = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention."""
        q, k, v = (
            layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for layer in (self.ask, self.find, self.take)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mix(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two attention layers between an embedding and a head."""

    def __init__(self, vocabulary: int = 11, width: int = 32, n_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Attention(width, n_heads) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def main(steps: int = 60) -> float:
    """Learn which token follows which; return the last loss."""
    torch.manual_seed(0)
    model = Model()
    rules = [
        Rule("layers.*.ask.weight", view=heads(4), name="queries per head"),
        Rule("layers.*.find.weight", view=heads(4), name="keys per head"),
        # The columns of an output projection belong to heads too. A view is an einops pattern.
        Rule("layers.1.mix.weight", view=View("m (h d) -> h m d", {"h": 4}), options={"weight_decay": 0.0}),
        Rule("head.weight", view=None, options={"lr": 3e-3}),
    ]
    optimizer = ASGO(route(model, rules), lr=1e-2)
    print(report(optimizer))
    loss = torch.tensor(0.0)
    for step in range(steps):
        tokens = torch.randint(0, 11, (32, 16))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (5 * tokens + 3).flatten() % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
