"""What the programs of this folder have in common on the command line: how they refuse, warn and check their flags."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on standard error."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """What went wrong, without the lines of advice that some libraries add."""
    return (str(error).splitlines() or [repr(error)])[0]


def check_least(options: Any, **least: float) -> None:
    """Refuse flags that are below their least value; exit status 2."""
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and not given >= value:
            fail(f"--{name.replace('_', '-')} {given}: must be at least {value}")


def make_folder_of(path: Path) -> None:
    """Make the folder of a result, before the work that fills it; exit status 2 if `path` cannot be written."""
    if path.is_dir():
        fail(f"cannot write to {path}: it is a folder; add a name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {path}: {error.strerror}")
    if not os.access(path.parent, os.W_OK):
        fail(f"cannot write to {path}: you may not write there")


def markdown_table(header: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    first, *others = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [first, "|" + "---|" * len(header), *others]
