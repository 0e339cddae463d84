#!/bin/sh
# torch.optim.AdamW on a CPU: the fused kernel takes a parameter for dense memory. A parameter with gaps, such as a
# column of a matrix, is updated in the wrong places, and the kernel writes into memory between its entries that is no
# part of it. Nothing is raised. The foreach and the single-tensor implementations are not affected.
# Exits with 1 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


def stepped(**options):
    """The column that is the parameter, and the column beside it, after one step."""
    table = torch.tensor([[1.0, 7.0]] * 4)
    column = torch.nn.Parameter(table[:, 0])
    column.grad = torch.ones(4)
    torch.optim.AdamW([column], lr=0.5, weight_decay=0.0, **options).step()
    return [[round(x, 4) for x in of.tolist()] for of in (table[:, 0], table[:, 1])]


print("torch", torch.__version__)
found = {}
for name, options in {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
    found[name] = stepped(**options)
    print(f"{name:8} parameter {found[name][0]}, beside it {found[name][1]}")
right = [[0.5] * 4, [7.0] * 4]
broken = found["fused"][0] != right[0] and found["fused"][1] != right[1]
sys.exit(not (found["single"] == right and found["foreach"] == right and broken))
PYTHON
