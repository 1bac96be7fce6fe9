"""What the programs of this folder have in common on the command line: how they refuse, warn and check their output."""

import os
import sys
from pathlib import Path
from typing import NoReturn


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on standard error."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)


def check_output(path: Path) -> None:
    """Refuse results that could not be written to `path`, before the work that makes them; exit status 2.

    Its folder is made only when there is something to write.
    """
    if os.path.isdir(path):
        fail(f"cannot write to {path}: it is a folder; add a name")
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if os.path.exists(path):
        if not os.access(path, os.W_OK):
            fail(f"cannot write to {path}: you may not write there")
    elif not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        fail(f"cannot write to {path.parent}: {folder} is not a folder that you may write to")
