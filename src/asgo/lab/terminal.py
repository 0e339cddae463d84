"""What every command of a terminal shares: flags read by tyro, errors in one line, exit codes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console
from torch import distributed

from asgo.lab.errors import Diverged, LabError
from asgo.lab.training.stopping import Stopped

C = TypeVar("C")
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""
GRACE = 0.1
"""Seconds that threads of a process group get to let go of their tensors, far more than they need."""


def parse(kind: Any, args: Sequence[str], program: str, description: str | None = None, default: Any = None) -> Any:
    """The config that the words describe; None if they asked for help, which is then printed.

    Args:
        kind: a dataclass, or a union of them for subcommands.
        args: the words after the program's name.
        program: its name, for the help.
        description: what it does; None: the docstring of `kind`.
        default: a config whose values replace the defaults of the fields; None: the class's own.

    Raises:
        LabError: for flags that do not exist or do not fit.
    """
    words = io.StringIO()
    defaults = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(words):
            return tyro.cli(kind, args=args, prog=program, description=description, **defaults)
    except SystemExit as stop:
        if stop.code:
            raise LabError(_without_box(words.getvalue())) from None
        return None


def _without_box(box: str) -> str:
    """The message inside the frame that tyro draws, without its rules, colours and title."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in box.splitlines()]
    inside = [line.strip("│ ") for line in lines if line.startswith("│")]
    message = " ".join(line for line in inside if line and not set(line) <= {"─"})
    return message or " ".join(lines)


def exit_code(parse: Callable[[], C | None], run: Callable[[C], Any]) -> int:
    """Make a config and run it: 0, 2 for what cannot be done, 130 after Ctrl-C, 1 after a broken pipe."""
    config = None
    try:
        config = parse()
        if config is not None:
            run(config)
        code = 0
    except Stopped as stopped:
        code = _fail(str(stopped), INTERRUPTED) if is_first_process() else INTERRUPTED
    except KeyboardInterrupt:
        hint = " Repeat the command with --resume to go on." if hasattr(config, "resume") else ""
        return _fail(f"interrupted.{hint}", INTERRUPTED)
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return _fail("stopped: broken pipe, the reader of its output has ended.", 1) if config is not None else 1
    except Diverged as error:
        code = _fail(f"error: {error}", 2)
    except LabError as error:
        return _fail(f"error: {error}", 2)
    _leave_processes()
    return code


def _leave_processes() -> None:
    """End the process group, if there is one, at an end that all ranks come to.

    Its threads would let go of their last tensors after the interpreter has ended, which aborts the process. They end
    with the group, so whatever holds it, as the wrapper of DDP does, goes first. After FSDP2 the group is held all
    the same: its threads get the time that letting go takes.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
        time.sleep(GRACE)


def say(console: Console, *lines: object) -> None:
    """Print lines as they are: no markup, no colours, broken by the terminal alone."""
    for line in lines:
        console.print(str(line), highlight=False, markup=False, soft_wrap=True)


def is_first_process() -> bool:
    """Whether this process prints for all of a run; a single process always does."""
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, code: int) -> int:
    print(f"asgo: {' '.join(message.split())}", file=sys.stderr)
    return code
