"""Where the parameters of a model stand: modules, names, ties, parametrizations and output heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose weight is looked up by index."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What wrappers of `torch.compile`, activation checkpointing and sharding call the module inside."""

PARALLEL = ("DataParallel", "DistributedDataParallel")
"""Wrappers that call the module inside ``module``."""


@dataclass(frozen=True)
class Site:
    """A trainable parameter and where it stands: `leaf` of `module`, which is `slot` of `parent`."""

    names: tuple[str, ...]
    param: nn.Parameter
    module: nn.Module
    leaf: str
    parent: nn.Module | None
    slot: str
    is_head: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.param.shape)


def find_sites(model: nn.Module) -> list[Site]:
    """All trainable parameters of a model, in the order of their first name.

    Raises:
        ValueError: if there is none, or one has no shape of its own.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(param, []).append(name)
    if not names:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: set requires_grad before routing.")
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = _output_heads(model)
    return [_site(modules, param, aliases, heads) for param, aliases in names.items()]


def without_wrappers(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name of a parameter as it is without compiled, checkpointed and data parallel wrappers around modules."""
    kept, path = [], ""
    for part in name.split("."):
        if not is_wrapper(modules[path], part):
            kept.append(part)
        path = f"{path}.{part}" if path else part
        if path not in modules:
            break  # the leaf
    return ".".join(kept)


def is_wrapper(module: nn.Module, inner: str) -> bool:
    """Whether a module only wraps the one it calls `inner`."""
    return inner in WRAPPED or (inner == "module" and type(module).__name__ in PARALLEL)


def _site(modules: Mapping[str, nn.Module], param: nn.Parameter, names: Sequence[str], heads: set[nn.Module]) -> Site:
    if is_lazy(param) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{names[0]!r} has no shape of its own: run a lazy model once before routing, and use "
            "DistributedDataParallel, which keeps parameters whole, instead of FullyShardedDataParallel."
        )
    places = [_place(modules, name, param) for name in names]
    path, leaf = next((place for place in places if isinstance(modules[place[0]], TABLES)), places[0])
    above, _, slot = path.rpartition(".")
    is_head = any(modules[place] in heads for place, _ in places)
    clean = tuple(without_wrappers(modules, name) for name in names)
    while path and is_wrapper(modules[above], slot):
        above, _, slot = above.rpartition(".")
    return Site(clean, param, modules[path], leaf, modules[above] if slot else None, slot, is_head)


def _place(modules: Mapping[str, nn.Module], name: str, param: nn.Parameter) -> tuple[str, str]:
    """The path of the module and the name there; a parametrized weight stands where the weight stood."""
    path, _, leaf = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, ParametrizationList) and param.numel() == max(p.numel() for p in owner.parameters(False)):
        holder, _, leaf = path.rpartition(".")  # path is "<module>.parametrizations.<leaf>"
        path = holder.rpartition(".")[0]
    return path, {"weight_v": "weight", "weight_orig": "weight"}.get(leaf, leaf)


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The output layers over a vocabulary.

    A model that can name its head is asked (`get_output_embeddings` of Hugging Face, anywhere inside).
    Otherwise it is the last Linear outside every `torch.nn.ModuleList`, if its weight has an embedding's
    shape.
    """
    modules = list(model.modules())
    asked = [getattr(module, "get_output_embeddings", None) for module in modules]
    if any(map(callable, asked)):
        answers = [answer for ask in asked if callable(ask) and isinstance(answer := ask(), nn.Module)]
        return {head for answer in answers for head in (answer if isinstance(answer, nn.ModuleList) else [answer])}
    inside = {inner for module in modules if isinstance(module, nn.ModuleList) for inner in module.modules()}
    linear = [module for module in modules if isinstance(module, nn.Linear) and module not in inside]
    tables = {(table.num_embeddings, table.embedding_dim) for table in modules if isinstance(table, TABLES)}
    return {last for last in linear[-1:] if (last.out_features, last.in_features) in tables}
