"""``python -m experiments.hessian``."""

import sys
from collections.abc import Sequence

from experiments.command import run_command
from experiments.hessian.config import HessianConfig
from experiments.hessian.experiment import hessian


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment; the words are those of the process if None."""
    return run_command("hessian", HessianConfig, hessian, args)


if __name__ == "__main__":
    sys.exit(main())
