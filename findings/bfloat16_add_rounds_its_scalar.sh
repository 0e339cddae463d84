#!/bin/sh
# torch on a CPU: adding a number to a bfloat16 tensor rounds the number to bfloat16 first; multiplying does not.
# So `x + 2.57` and `torch.add(x, y, alpha=2.57)` are off by up to half a unit of 2.57 whatever x is, and always to
# the same side: a bias where one expects a rounding. `(x.float() + 2.57).bfloat16()` has one rounding.
# Exits with 1 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

x, c = torch.linspace(-1, 1, 4097).bfloat16(), 2.57
rounded = torch.tensor(c).bfloat16().item()
cases = {
    "x + c": (x + c, x.float() + c, x.float() + rounded),
    "add(x, x, alpha=c)": (torch.add(x, x, alpha=c), x.float() + c * x.float(), x.float() + rounded * x.float()),
    "x * c": (x * c, x.float() * c, x.float() * rounded),
}
print("torch", torch.__version__, "c =", c, "in bfloat16", rounded)
as_scalar_rounded = {}
for name, (found, one_rounding, scalar_rounded) in cases.items():
    wrong = (found != one_rounding.bfloat16()).float().mean().item()
    bias = (found.double() - one_rounding.double()).mean().item()
    as_scalar_rounded[name] = torch.equal(found, scalar_rounded.bfloat16())
    print(f"{name:20} differs from one rounding in {wrong:.0%}, mean error {bias:+.1e}, as if c were rounded: {as_scalar_rounded[name]}")
sys.exit(as_scalar_rounded != {"x + c": True, "add(x, x, alpha=c)": True, "x * c": False})
PYTHON
