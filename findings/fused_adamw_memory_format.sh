#!/bin/sh
# torch.optim.AdamW: after `module.to(memory_format=torch.channels_last)` between two steps, the fused kernel pairs the
# entries of a parameter with moments of other entries: parameters and moments have the same shape and other strides,
# and the kernel walks both in memory order. Nothing is raised, the numbers are those of no optimizer. The foreach and
# the single-tensor implementations are not affected.
# Exits with 1 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


def trained(convert, **options):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, bias=False)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=1e-2, **options)
    dice = torch.Generator().manual_seed(1)
    for step in range(4):
        if convert and step == 2:
            conv.to(memory_format=torch.channels_last)
        conv.weight.grad = torch.empty_like(conv.weight).copy_(torch.randn(conv.weight.shape, generator=dice))
        optimizer.step()
    return conv.weight.detach()


print("torch", torch.__version__)
found = {}
for name, options in {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}.items():
    found[name] = (trained(True, **options) - trained(False, **options)).abs().max().item()
    print(f"{name:8} largest difference to the run without the conversion: {found[name]:.1e}")
sys.exit(not (found["fused"] > 1e-3 and found["foreach"] < 1e-6 and found["single"] < 1e-6))
PYTHON
