"""All that differs between a CUDA device and a CPU, so that a rehearsal on a CPU runs the same code."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16", "float16")
"""Of matrix products."""

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
"""How the calls of the driver begin that start work on the device."""

Mode = Literal["global", "thread_local", "relaxed"]


@dataclass(frozen=True)
class Device:
    """Where everything runs.

    Args:
        torch: the device.
    """

    torch: torch.device

    @staticmethod
    def pick(name: Literal["cuda", "cpu"]) -> Device:
        """The first CUDA device, or the CPU.

        Raises:
            RuntimeError: there is no CUDA device and "cuda" was asked for.
        """
        if name == "cpu":
            return Device(torch.device("cpu"))
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device: pass --rehearse to try this on a CPU.")
        torch.cuda.set_device(0)
        return Device(torch.device("cuda", 0))

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.torch.type == "cuda"

    @property
    def backend(self) -> Literal["nccl", "gloo"]:
        """Of `torch.distributed`."""
        return "nccl" if self.is_cuda else "gloo"

    def synchronize(self) -> None:
        """Wait until all work that was started is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def is_alive(self) -> bool:
        """False after an error that leaves the device unusable for this process, such as an illegal address."""
        try:
            self.synchronize()
            return bool(torch.ones(1, device=self.torch).sum().item() == 1)
        except RuntimeError:
            return False

    def release(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object]) -> float:
        """How long `run` takes: by CUDA events around it on an idle device, by the clock on a CPU."""
        self.synchronize()
        with _no_collection():
            if not self.is_cuda:
                start = time.perf_counter()
                run()
                return time.perf_counter() - start
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """The most memory that `run` takes beyond what was taken before; None on a CPU, where nothing counts it."""
        if not self.is_cuda:
            run()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch) - before

    def free_bytes(self) -> int:
        """Memory that can be taken."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.is_cuda else 2**30

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Inside, an operation that makes the host wait for the device raises. A CPU has nothing to wait for."""
        self.synchronize()
        if self.is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.is_cuda:
                torch.cuda.set_sync_debug_mode("default")

    def capture(self, run: Callable[[], object], warm: int, mode: Mode = "global") -> Callable[[], object]:
        """A graph of one `run`, after `warm` runs that are carried out; calling what is returned replays it.

        On a CPU what is returned is `run` itself.
        """
        if not self.is_cuda:
            _repeat(run, warm)
            return run
        aside = torch.cuda.Stream(self.torch)
        aside.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(aside):
            _repeat(run, warm)
        torch.cuda.current_stream(self.torch).wait_stream(aside)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=mode):
            run()
        return graph.replay

    def profile(self, run: Callable[[], object]) -> dict[str, float | None]:
        """Launches of `run`, kernels, and seconds that the device is busy; on a CPU its operators instead of launches.

        None where the profiler is not allowed to see the device.
        """
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces itself on standard error
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        with profile(activities=kinds) as profiler:
            run()
            self.synchronize()
        events = _events(profiler)
        if not self.is_cuda:
            operators = sum(event.name().startswith("aten::") for event in events)
            return {"launches": operators, "kernels": None, "busy": None}
        launches = sum(event.name().startswith(LAUNCHES) for event in events)
        work = [event for event in events if event.device_type() == DeviceType.CUDA and not _is_note(event)]
        kernels = [event for event in work if not event.name().startswith(("Memcpy", "Memset"))]
        busy = sum(event.duration_ns() for event in kernels) / 1e9
        return {"launches": launches or None, "kernels": len(kernels) or None, "busy": busy or None}

    @contextmanager
    def products(self, precision: Precision) -> Iterator[torch.dtype]:
        """The dtype to multiply in; inside, products of that dtype have this precision (TF32 on CUDA alone)."""
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield torch.float32 if precision in ("float32", "tf32") else getattr(torch, precision)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def _events(profiler: profile) -> list[Any]:
    """The profiler's own events: to make Python objects of all of them takes longer than the step."""
    results: Any = getattr(profiler.profiler, "kineto_results", None)
    return [] if results is None else list(results.events())


def _is_note(event: Any) -> bool:
    """Whether it only names a stretch of time, as `torch.optim.Optimizer` does with each step."""
    return event.name().startswith(("Optimizer.", "ProfilerStep")) or event.is_user_annotation()


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


@contextmanager
def _no_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
