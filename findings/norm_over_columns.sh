#!/bin/sh
# torch on a CPU: torch.linalg.vector_norm of a float32 matrix takes over ten times as long along the axis that memory
# does not run along as the squares, their sum and its root do, which read the matrix twice; along the other axis it is
# the faster one. Optimizers take norms of rows and columns of every update (limits, second moments per row or column).
# Times are of the processor, the least of some runs; the bound leaves a factor of four. Exits with 1 if that has changed.
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


def seconds(run):
    run()
    found = []
    for _ in range(20):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


X, slower = torch.randn(1024, 1024), []
for axis, name in ((0, "columns"), (1, "rows")):
    norm = seconds(lambda: torch.linalg.vector_norm(X, dim=axis))
    squares = seconds(lambda: X.square().sum(axis).sqrt())
    assert torch.allclose(torch.linalg.vector_norm(X, dim=axis), X.square().sum(axis).sqrt())
    print(f"1024 x 1024, norms of {name}: vector_norm {1e3 * norm:.3f} ms, squares, sum and root {1e3 * squares:.3f} ms")
    slower.append(norm / squares)
sys.exit(not (slower[0] > 4 and slower[1] < 2))
PYTHON
