"""The memory that a step allocates, found by running one on tensors without data."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asgo._types import State
from asgo.distributed.ownership import WorkPartition
from asgo.linalg.inverse_root import ROOTS
from asgo.optimizer.step import StructuredOptimizer, structured


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside this context make, from when they are made until all are gone.

    A storage counts once, whatever views it has. Temporary memory within a kernel (LAPACK's workspace, a copy of a
    factor with other strides) is not seen.

    Attributes:
        now: bytes made inside and alive, less the bytes that were there before and are gone.
        peak: the most that `now` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and take up the storages of what goes in and comes out."""
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor)
        result = self.run(func, args, kwargs or {})
        self.now += sum(map(self._meet, _tensors(result)))
        self.peak = max(self.peak, self.now)
        return result

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation."""
        return func(*args, **kwargs)

    def _meet(self, tensor: Tensor) -> int:
        """Follow the storage of a tensor to its end; its bytes if it was not known. Those of "meta" have no memory."""
        if tensor.device.type == "meta":
            return 0
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return 0
        mode = weakref.ref(self)

        def end(_: object) -> None:
            alive = mode()
            if alive is not None:
                del alive._known[key]
                alive.now -= size

        self._known[key] = weakref.ref(storage, end)
        return size


class _Usual(LiveBytes):
    """Answers the questions that a step asks of its data on a CPU, where there is none: all is finite, step 1."""

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype in (torch.bool, torch.float32):
            return True if args[0].dtype == torch.bool else 1.0
        if func is torch.ops.aten.nonzero.default and args[0].dtype == torch.bool:  # of failures, on their way to host
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        return func(*args, **kwargs)


def step_bytes(optimizer: Optimizer) -> int | None:
    """The most bytes that a step with all gradients and all roots due takes above parameters, gradients and state.

    No formula: it steps a copy of the optimizer on tensors that have device, shape and strides but no memory
    (`torch._subclasses.FakeTensorMode`), and follows every allocation. Nothing of the optimizer changes. What kernels
    allocate internally is not counted, and one thread decomposes all matrices of a stack. Where a step on a CPU depends
    on its data, it is assumed that all is finite and every root succeeds (and that `asgo.AdaGram` has not reached its
    rank; once it has, a step takes about twice as much). Parameters on the meta device are counted as on the CPU.

    With plain matrices ``(m, n)``, k the shorter side, in float32 `asgo.ASGO` takes on a CPU, with ``root="minimax"``,
    2 m n + 10 k^2 numbers per matrix of a bucket: at most 12 times `asgo.optimizer.bucket.BUCKET_BYTES` (14 packed),
    or as many times the largest matrix if that is larger. AdamW takes nothing in float32; parameters of lower
    precision are widened with their gradients all at once, 8 bytes for each of their entries.

    Args:
        optimizer: one of this library's, or `asgo.SPAM` around one.

    Returns:
        None for parameters that several ranks share, and where torch cannot run the step without data.
    """
    inner = structured(optimizer)
    if inner is None or not inner.is_local():
        return None
    _fill_caches(inner.param_groups)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # other threads would allocate unseen
        with FakeTensorMode(allow_non_fake_inputs=True):
            twin = _twin(inner)
            with _Usual():
                _prepare(twin)
            with _Usual() as live:
                twin.step()
    except RuntimeError:
        return None
    finally:
        torch.set_num_threads(threads)
    return live.peak


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _fill_caches(groups: Sequence[Mapping[str, Any]]) -> None:
    """Let roots compute their constants while tensors have data: they are kept for the process."""
    matrices = (group for group in groups if any(group["views"]) and group["root"] in ROOTS)
    for root, eps in {(group["root"], group["eps"]) for group in matrices}:
        for dtype in (torch.float32, torch.float64):
            for name in (root, "minimax") if root == "auto" else (root,):
                ROOTS[name](torch.ones(1, 1, 1, dtype=dtype), eps)


def _twin(optimizer: StructuredOptimizer) -> StructuredOptimizer:
    """An optimizer with the same groups, of parameters, gradients and state without data."""
    twin = object.__new__(type(optimizer))
    twin.__setstate__({"defaults": dict(optimizer.defaults), "_partition": WorkPartition(), **_contents(optimizer)})
    twin.step_hooks = optimizer.step_hooks
    for hook in twin.step_hooks:
        hook.before_peak(twin.param_groups)
    twin.step = torch.no_grad()(partial(unwrap(type(twin).step), twin))  # without hooks, which are others' code
    return twin


def _contents(optimizer: Optimizer) -> dict[str, Any]:
    """Groups and state without data, in the fake mode that is on."""
    hollow = {param: _hollow_parameter(param) for group in optimizer.param_groups for param in group["params"]}
    state: dict[Tensor, State] = defaultdict(dict)
    for param, own in optimizer.state.items():
        state[hollow[param]] = {key: _hollow(value) for key, value in own.items() if isinstance(value, Tensor)}
    groups = [{**group, "params": [hollow[param] for param in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def _prepare(twin: Any) -> None:
    """Make what state a twin lacks and its buckets; of buckets that are alike keep one: they step one by one."""
    for plan in twin._current_plans():
        alike = {(bucket.shape, bucket.view, bucket.index, len(bucket.parts)): bucket for bucket in plan.buckets}
        plan.buckets[:] = alike.values()


def _hollow_parameter(param: Tensor) -> Tensor:
    """A parameter like this one, with a gradient if it is trained."""
    made = torch.nn.Parameter(_hollow(param), requires_grad=param.requires_grad)
    made.grad = _hollow(param) if param.requires_grad else None
    return made


def _hollow(tensor: Tensor) -> Tensor:
    device = "cpu" if tensor.is_meta else tensor.device
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
