"""What the tests of whole runs share: start a script as a process or in this one, and read what it leaves behind."""

import ast
import contextlib
import functools
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, STARTED, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten_with_path

BATCH = 4 * 8  # agent steps of one iteration
TINY = ["--num-envs", "4", "--num-steps", "8", "--num-minibatches", "1", "--update-epochs", "1"]
TINY += ["--norm-init-steps", "2", "--model", "A", "--no-cuda"]
ENDLESS = ["--total-timesteps", "1000000000"]
RUN = Path("runs/run")
PATIENCE = 300  # seconds after which a process counts as hung


def flags(iterations: int, *more: str) -> list[str]:
    """The arguments of a tiny new run of this many iterations."""
    return [*TINY, "--total-timesteps", str(iterations * BATCH), "--run-name", "run", *more]


def resume(iterations: int, *more: str) -> list[str]:
    """The arguments that go on with it until it has this many."""
    return ["--resume", "runs/run", "--total-timesteps", str(iterations * BATCH), *more]


def start(script: str, arguments: list[str], cwd: Path, **changes: object) -> subprocess.Popen:
    """Start a script as the leader of a process group, as a shell does."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    options = dict(cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | changes
    STARTED.append(subprocess.Popen(command, start_new_session=True, text=True, **options))
    return STARTED[-1]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a process; returns its exit status, output and errors."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Return once `condition()` is true; fails if that takes too long, or if the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process or time.monotonic() < deadline
        if process and (process.poll() is not None or time.monotonic() > deadline):
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"exit status {process.returncode} while waiting\n{out}\n{err}")
        time.sleep(0.001)


def read_terminal(terminal: int, until: str = "(?!)") -> str:
    """What the other side of a terminal shows, to the end or until it fits a pattern."""
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal
        while not re.search(until, shown, re.DOTALL):
            assert select.select([terminal], [], [], PATIENCE)[0]
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def call_main(script: ModuleType, arguments: list[str]) -> int:
    """Run what stands at the end of a script in this process and in the working folder; returns the exit status.

    The start weights are normal instead of orthogonal: those take seconds to draw, and any will do here.
    """
    guarded = ast.parse(Path(script.__file__).read_text()).body[-1]  # if __name__ == "__main__":
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)  # tiny networks do not gain from more
    try:
        with (
            mock.patch.object(sys, "argv", [script.__file__, *arguments]),
            mock.patch.object(torch.nn.init, "orthogonal_", lambda weight, gain: weight.data.normal_(0, 0.01 * gain)),
        ):
            exec(compile(ast.Module(guarded.body, []), script.__file__, "exec"), vars(script))
    except SystemExit as end:
        return end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def error_line(capsys: pytest.CaptureFixture) -> str:
    """What was printed on standard error, which must be one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def read_checkpoint(run_dir: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def read_events(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], str]:
    """{tag: [(step, value), ...]} as TensorBoard shows them, and the text of the hyperparameters."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    return scalars, text


def read_scalars(run_dir: Path, speed: bool = True) -> dict[str, list[tuple[int, float]]]:
    """The scalars alone; on request without the one that measures time."""
    scalars, _ = read_events(run_dir)
    return {tag: points for tag, points in scalars.items() if speed or tag != "charts/SPS"}


RUNS = tempfile.TemporaryDirectory()


@functools.cache
def trained_run(script: str, game: str, iterations: int) -> Path:
    """The folder of a small real run, trained once for all tests."""
    name = f"{script}/{game}/seed_1"
    arguments = [*TINY, "--num-steps", "64", "--total-timesteps", str(iterations * 4 * 64)]
    arguments += ["--env-id", f"{game}-v5", "--run-name", name]
    run_script(script, arguments, Path(RUNS.name)).check_returncode()
    return Path(RUNS.name, "runs", name)


def error_of(main: Callable, capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The only line that a tool leaves on standard error at exit status 2."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    assert stop.value.code == 2
    return error_line(capsys)


def assert_whole_curve(run_dir: Path, iterations: int) -> None:
    """Every loss was logged once at each iteration, in order."""
    steps = [BATCH * (iteration + 1) for iteration in range(iterations)]
    scalars = read_scalars(run_dir)
    assert {"losses/value_loss", "losses/distillation", "charts/SPS", "charts/explored_rooms"} <= set(scalars)
    for tag, points in scalars.items():
        if not tag.startswith("charts/episodic"):  # which are logged where an episode ended
            assert [step for step, _ in points] == steps, tag


def assert_equal(a: dict, b: dict) -> None:
    """Two nested states are equal bit for bit."""
    leaves, others = (dict(tree_flatten_with_path(state)[0]) for state in (a, b))
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, others[path], rtol=0, atol=0)
        else:
            assert leaf == others[path], path
