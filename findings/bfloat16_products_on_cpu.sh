#!/bin/sh
# torch on a CPU without units for bfloat16 (AVX2 alone): A @ B in bfloat16 takes tens of times as long as in float32, and
# several times as long as A @ B.T in bfloat16, whose rows are read along memory. torch.optim.Muon computes in bfloat16
# whatever its parameters are, so that its step takes many times that of the same five iterations in float32.
# Times are of the processor, the least of some runs; the bounds leave a factor of three. Exits with 1 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
    print("this CPU has units for bfloat16: nothing to see")
    sys.exit(0)


def seconds(run, times=3):
    run()
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


wide = torch.randn(512, 512)
half = wide.bfloat16()
plain, turned, single = seconds(lambda: half @ half), seconds(lambda: half @ half.T), seconds(lambda: wide @ wide)
print(f"512 x 512, bfloat16: A @ B {plain:.4f} s, A @ B.T {turned:.4f} s; float32: A @ B {single:.4f} s")

weight = torch.nn.Parameter(torch.randn(512, 512))
weight.grad = torch.randn(512, 512)
muon = seconds(torch.optim.Muon([weight], lr=0.01).step, 2)


def float32():
    X = weight.grad / weight.grad.norm()
    for _ in range(5):
        R = X @ X.T
        X = torch.addmm(X, torch.addmm(R, R, R, beta=-4.775, alpha=2.0315), X, beta=3.4445)


same = seconds(float32)
print(f"a step of torch.optim.Muon on float32 parameters {muon:.3f} s, its iteration in float32 {same:.3f} s")
sys.exit(not (plain > 8 * single and plain > 2 * turned and muon > 5 * same))
PYTHON
