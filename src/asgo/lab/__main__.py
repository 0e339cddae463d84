"""``python -m asgo.lab`` and the script ``asgo`` are the same command."""

import sys

try:
    from asgo.lab.cli import main
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("asgo"):
        raise
    print(
        f"asgo: error: the command needs {missing.name}, which is not installed: pip install 'asgo[lab]' brings all "
        "it needs.",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
