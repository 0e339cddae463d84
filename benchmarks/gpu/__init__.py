"""What asgo does on a GPU, by one command from a checkout: ``python -m benchmarks.gpu``, see ``docs/gpu.md``.

Needs Python 3.10, torch 2.11 and einops; nothing is installed or downloaded. The library is the checkout's own.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))
