"""What GPUs and their links can do at best, as their makers publish it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

GpuName = Literal["A100", "H100", "H200"]


@dataclass(frozen=True)
class Gpu:
    """Speeds of one GPU and its links. Products count two operations for each multiplication.

    Args:
        bf16_tflops: dense bfloat16 products, 1e12 operations per second.
        tf32_tflops: dense TF32 products.
        fp32_tflops: float32 products, without tensor cores.
        memory_gb: memory, 1e9 bytes.
        memory_gbs: its bandwidth, 1e9 bytes per second.
        nvlink_gbs: from one GPU to the others of its node, in one direction.
        network_gbs: from one GPU to another node, in one direction.
    """

    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb: float
    memory_gbs: float
    nvlink_gbs: float
    network_gbs: float


GPUS: dict[GpuName, Gpu] = {
    "A100": Gpu(312, 156, 19.5, 80, 2039, 300, 25),
    "H100": Gpu(989.4, 494.7, 66.9, 80, 3350, 450, 50),
    "H200": Gpu(989.4, 494.7, 66.9, 141, 4800, 450, 50),
}
"""SXM boards: peaks of the makers' data sheets without sparsity, half of NVLink's two-way bandwidth, and a network
adapter of 200 (A100) or 400 Gbit/s for each GPU."""


@dataclass(frozen=True)
class Machine:
    """What is reached of a GPU's peaks, in operations and bytes per second.

    Args:
        gpu: the peaks.
        utilization: the share of them that products, memory and links reach.
        gpus_per_node: how many are joined by NVLink.
    """

    gpu: Gpu
    utilization: float
    gpus_per_node: int

    @property
    def bf16(self) -> float:
        """Operations per second of bfloat16 products."""
        return self.gpu.bf16_tflops * 1e12 * self.utilization

    @property
    def fp32(self) -> float:
        """Operations per second of float32 products."""
        return self.gpu.fp32_tflops * 1e12 * self.utilization

    @property
    def memory(self) -> float:
        """Bytes per second from and to memory."""
        return self.gpu.memory_gbs * 1e9 * self.utilization

    def root(self, name: str) -> float:
        """Operations per second of the products of a root, those that bf16x3 replaces by three counted once."""
        rates = {"minimax_tf32": self.gpu.tf32_tflops * 1e12, "minimax_bf16x3": self.gpu.bf16_tflops * 1e12 / 3}
        return rates[name] * self.utilization if name in rates else self.fp32

    def link(self, ranks: int) -> float:
        """Bytes per second of a rank, in one direction, among so many ranks: NVLink within a node."""
        peak = self.gpu.nvlink_gbs if ranks <= self.gpus_per_node else self.gpu.network_gbs
        return peak * 1e9 * self.utilization


def describe(name: GpuName, own: Mapping[str, float | None]) -> Gpu:
    """The named GPU with a person's own numbers in place of those that are not None."""
    return replace(GPUS[name], **{key: value for key, value in own.items() if value is not None})
