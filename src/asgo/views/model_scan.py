"""Where the parameters of a model stand: modules, names, ties, parametrizations, wrappers and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from asgo.views.vocabulary import TABLES, Vocabulary, find_vocabulary, is_numbered

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What wrappers of `torch.compile`, activation checkpointing and sharding call the module inside."""

PARALLEL = ("DataParallel", "DistributedDataParallel")
"""Wrappers that call the module inside ``module``."""


@dataclass(frozen=True)
class Site:
    """A trainable parameter and where it stands: `leaf` of `module`, which is `slot` of `parent`.

    Args:
        names: all names of the parameter, without wrappers; the first is the one it is known by.
        param: the parameter.
        module: the module that holds it.
        leaf: its name there.
        parent: the module above, through wrappers; None for the model itself.
        slot: what `module` is called there.
        ancestors: paths of the modules above, the nearest first, each with the module and the name below it.
        vocabulary: of the whole model.
    """

    names: tuple[str, ...]
    param: nn.Parameter
    module: nn.Module
    leaf: str
    parent: nn.Module | None
    slot: str
    ancestors: tuple[tuple[nn.Module, str], ...]
    vocabulary: Vocabulary

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.param.shape)

    @property
    def chain(self) -> list[nn.Module]:
        """The module and all above it."""
        return [self.module, *(module for module, _ in self.ancestors)]

    def places(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules that may know this layer, with its name there: the parent, and above as long as it is alone."""
        below = self.module
        for module, slot in self.ancestors:
            yield module, slot
            if isinstance(module, nn.ModuleList) or is_numbered(module):  # one of several alike
                below = module
                continue
            layers = [child for child in module.children() if any(p.ndim >= 2 for p in child.parameters())]
            if len(layers) > 1 or any(p.ndim >= 2 for p in module.parameters(recurse=False)) or below not in layers:
                return
            below = module


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
    vocabulary = find_vocabulary(model)
    return [_site(modules, param, aliases, vocabulary) for param, aliases in names.items()]


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


def _site(modules: Mapping[str, nn.Module], param: nn.Parameter, names: Sequence[str], vocabulary: Vocabulary) -> Site:
    if is_lazy(param) or getattr(param, "_fsdp_flattened", False) or hasattr(param, "ds_id"):
        raise ValueError(
            f"{names[0]!r} has no shape of its own: run a lazy model once before routing, and use fully_shard or "
            "DistributedDataParallel instead of FullyShardedDataParallel or DeepSpeed's ZeRO-3."
        )
    places = [_place(modules, name, param) for name in names]
    heads = [place for place in places if modules[place[0]] in vocabulary.heads]
    path, leaf = next((place for place in places if isinstance(modules[place[0]], TABLES)), [*heads, *places][0])
    above = tuple(_above(modules, path))
    parent, slot = above[0] if above else (None, "")
    clean = tuple(without_wrappers(modules, name) for name in names)
    return Site(clean, param, modules[path], leaf, parent, slot, above, vocabulary)


def _above(modules: Mapping[str, nn.Module], path: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules above a path, without wrappers, each with the name of what is below it."""
    while path:
        path, _, slot = path.rpartition(".")
        if not is_wrapper(modules[path], slot):
            yield modules[path], slot


def _place(modules: Mapping[str, nn.Module], name: str, param: nn.Parameter) -> tuple[str, str]:
    """The path of the module and the name there; a parametrized weight stands where the weight stood."""
    path, _, leaf = name.rpartition(".")
    owner = modules[path]
    own = owner.parameters(recurse=False) if isinstance(owner, ParametrizationList) else ()
    if param.numel() == max((p.numel() for p in own), default=None):
        holder, _, leaf = path.rpartition(".")  # path is "<module>.parametrizations.<leaf>"
        path = holder.rpartition(".")[0]
    if isinstance(owner, (nn.ParameterList, nn.ParameterDict)) and path:
        path, _, leaf = path.rpartition(".")
    for suffix, partner in (("_v", "_g"), ("_orig", "")):  # of the older weight_norm and spectral_norm
        base = leaf.removesuffix(suffix)
        if base != leaf and hasattr(owner, base + partner):
            return path, base
    return path, leaf
