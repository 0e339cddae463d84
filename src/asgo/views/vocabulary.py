"""The vocabularies of a model: their sizes, and the layers that give one number for every token.

A head is recognised by what it is for, in this order: the model names it (`get_output_embeddings` of Hugging Face,
anywhere inside), its class is made for it, or its weight has a vocabulary's length on one side and it stands outside
the repeated blocks. Vocabularies are the lengths of token tables, and what configs call ``vocab_size``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose weight is looked up by index."""

HEAD_SLOTS = {
    *("lm_head", "embed_out", "unembed", "unembedding", "to_logits", "logits", "logits_proj", "output_projection"),
    *("codec_head", "codebooks_head", "vocab_head", "vocab_proj", "shared_head", "lm_logits"),
}
"""Exact names of vocabulary heads: with a vocabulary's length they are heads even inside blocks."""

HEAD_WORDS = {"ctc", "rnnt", "vocab", "vocabulary", "unembed", "unembedding"}
SURE_SLOTS = {"lm_head", "lm_logits", "embed_out"}
"""Words and exact names of vocabulary heads even where no size of a vocabulary is known."""

FEWEST = 10
"""Tokens of a vocabulary: tables of fewer rows are flags or types, and as many outputs a classifier."""

WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "encoder_hidden_size")
"""What configs call the width of hidden states."""

_NOT_TOKENS = {
    *("position", "positions", "positional", "pos", "wpe", "type", "types", "segment", "segments", "seg", "time"),
    *("timestep", "timesteps", "step", "level", "relative", "rel", "distance", "row", "col", "column", "speaker"),
    *("h", "w", "x", "y", "height", "width", "class", "classes", "label", "labels", "language", "lang", "mode"),
}
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


def words(name: str) -> list[str]:
    """The words of a name: ``"cls_registerToken2"`` has cls, register and token."""
    return [word.lower() for word in _WORD.findall(name)]


@dataclass(frozen=True)
class Vocabulary:
    """What a model's vocabularies say about its layers.

    Args:
        heads: modules that are heads, and all inside them.
        sizes: numbers of tokens.
        widths: of the tables and hidden states, which a vocabulary may happen to equal.
        blocks: modules inside repeated blocks, each with its block.
        last: the last dense layer outside the blocks.
    """

    heads: frozenset[nn.Module]
    sizes: frozenset[int]
    widths: frozenset[int]
    blocks: dict[nn.Module, nn.Module]
    last: nn.Module | None

    def is_output(self, module: nn.Module, slots: Iterable[str]) -> bool:
        """Whether a layer is an output of the model by its name or place, whatever its size."""
        return module in self.heads or module is self.last or bool(HEAD_SLOTS.intersection(slots))

    def is_head(self, module: nn.Module, slots: Iterable[str], out: int, inner: int) -> bool:
        """Whether a layer with `out` numbers per token and `inner` features is a vocabulary head.

        A layer that reads a vocabulary (`inner`) is a table.
        """
        if module in self.heads:
            return True
        named = bool(HEAD_SLOTS.intersection(slots))
        if module in self.blocks:
            ends = out in self.sizes and out != inner and out >= FEWEST and _ends(self.blocks[module], module, out)
            return ends or (named and self._is_padded(out))
        if out in self.sizes and (named or module is self.last):
            return True
        if (named or module is self.last) and self._is_filled_up(out):
            return True
        if inner == out or out < 2:
            return False
        gives = out not in self.widths and (out in self.sizes or (inner in self.widths and self._is_padded(out)))
        reads = inner not in self.widths and inner in self.sizes and inner > out
        return max(out, inner) >= FEWEST and (gives or reads)

    def _is_filled_up(self, out: int) -> bool:
        """A vocabulary's length and a blank, or as much as makes it a multiple of 64; of an output layer only."""
        sizes = [size for size in self.sizes if size >= FEWEST]
        return out - 1 in sizes or any(out % 64 == 0 <= out - size < min(128, size // 10) for size in sizes)

    def _is_padded(self, out: int) -> bool:
        """A vocabulary's length, or up to padding: a row more or less, or up to a multiple of 128."""
        sizes = [size for size in self.sizes if size >= FEWEST]
        return out in self.sizes or any(abs(out - size) <= max(1, min(127, size // 50)) for size in sizes)


def find_vocabulary(model: nn.Module) -> Vocabulary:
    """The vocabularies of a model and its heads."""
    modules = dict(model.named_modules())
    tables = {name: module for name, module in modules.items() if _is_table(module)}
    tokens = {name: len(table.weight) for name, table in tables.items() if not _NOT_TOKENS & set(words(_slot(name)))}  # pyright: ignore
    tokens = {name: length for name, length in tokens.items() if 4 * length >= max(tokens.values())}
    blocks = dict(_in_blocks(modules.values()))
    named = [*_heads_by_name(modules, blocks)]
    sizes = {*tokens.values(), *(size for module in modules.values() for size in _stated_sizes(module))}
    sizes |= {outputs(module) for module in named}
    dense = [module for module in modules.values() if _is_dense(module) and module not in blocks]
    return Vocabulary(
        frozenset([*named, *(inner for head in _named_heads(modules.values()) for inner in head.modules())]),
        frozenset(sizes),
        frozenset([*(int(table.weight.shape[1]) for table in tables.values()), *_widths(modules.values())]),  # pyright: ignore
        blocks,
        dense[-1] if dense else None,
    )


def _ends(block: nn.Module, module: nn.Module, out: int) -> bool:
    """Whether a layer is one that nothing in its block reads: neither all of its outputs, nor a part, nor several."""
    if not isinstance(module, nn.Linear):
        return False
    read = {other.in_features for other in block.modules() if isinstance(other, nn.Linear)}
    return not any(out % width == 0 or width % out == 0 for width in read if width > 1)


def _slot(name: str) -> str:
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), "")


def _is_table(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    known = isinstance(module, TABLES) or (hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim"))
    return known and isinstance(weight, Tensor) and weight.ndim == 2


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _stated_sizes(module: nn.Module) -> Iterator[int]:
    """What a module's config calls the size of a vocabulary."""
    config = getattr(module, "config", None)
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if name.endswith("vocab_size") and "type" not in name and isinstance(value, int) and value > 1:
            yield value


def _widths(modules: Iterable[nn.Module]) -> Iterator[int]:
    for module in modules:
        values = (getattr(getattr(module, "config", None), name, None) for name in WIDTHS)
        yield from (value for value in values if isinstance(value, int))


def _named_heads(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """What models answer, and modules made for nothing else."""
    for module in modules:
        ask = getattr(module, "get_output_embeddings", None)
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            yield module
        answer = _answer(ask) if callable(ask) else None
        if isinstance(answer, nn.Module):
            yield answer


def _heads_by_name(modules: Mapping[str, nn.Module], blocks: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """Heads whose name is enough, outside the blocks; of a head with several layers the last one."""
    for name, module in modules.items():
        slot = name.rpartition(".")[2]
        if module in blocks or not (slot in SURE_SLOTS or HEAD_WORDS.intersection(words(slot))):
            continue
        layers = [layer for layer in module.modules() if outputs(layer) and layer not in blocks]
        if layers and outputs(layers[-1]) >= FEWEST:
            yield layers[-1]


def outputs(layer: nn.Module) -> int:
    """The outputs of a dense layer or of a convolution over single positions; 0 of others."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and set(layer.kernel_size) == {1}:
        return layer.out_channels
    if not _is_dense(layer) or not isinstance(getattr(layer, "weight", None), Tensor):
        return 0
    return int(layer.weight.shape[0 if isinstance(layer, nn.Linear) else 1])  # pyright: ignore


def _answer(ask: object) -> object:
    try:
        return ask()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        return None


def _in_blocks(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Everything inside repeated elements with layers, but no table of tokens: of lists, and of sequences if alike.

    A dictionary with numbers for keys is a list.
    """
    for container in modules:
        is_list = isinstance(container, nn.ModuleList) or is_numbered(container)
        elements = [*container.children()] if is_list or isinstance(container, nn.Sequential) else []
        for element in elements:
            alike = sum(type(other) is type(element) for other in elements)
            if isinstance(element, nn.ModuleList) or (isinstance(container, nn.Sequential) and alike < 2):
                continue
            inside = list(element.modules())
            layers = any(any(p.ndim >= 2 for p in module.parameters(recurse=False)) for module in inside[1:])
            if layers and not any(map(_is_table, inside)):
                yield from ((module, element) for module in inside)


def is_numbered(module: nn.Module) -> bool:
    """Whether a module is a dictionary whose keys are numbers."""
    return isinstance(module, nn.ModuleDict) and len(module) > 0 and all(key.isdigit() for key in module)
