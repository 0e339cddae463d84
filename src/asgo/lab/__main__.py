"""``python -m asgo.lab`` is the command ``asgo``."""

from __future__ import annotations

from asgo.lab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
