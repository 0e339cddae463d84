"""The script ``asgo``, ``python -m asgo`` and ``python -m asgo.lab``: one command, of the distribution asgo-lab."""

import sys
from importlib import import_module
from importlib.util import find_spec

LACKS = (
    "asgo: error: the command needs {}, which is not installed: pip install asgo-lab, or in a clone "
    "pip install -e '.[lab]', brings all it needs.\n"
)


def main() -> int:
    """Run the command; without what it needs say so and return 2."""
    if find_spec("asgo.lab") is None:
        sys.stderr.write(LACKS.format("asgo-lab"))
        return 2
    try:
        cli = import_module("asgo.lab.cli")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("asgo"):
            raise
        sys.stderr.write(LACKS.format(error.name))
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
