"""Signals and the live line, disks, numbers that are not finite, memory, and what a long run must not pile up."""

import ctypes
import gc
import importlib
import os
import pty
import re
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ENTROPY, ENVIRONMENT, ROOT, SND, make_args
from running import (
    BATCH,
    ENDLESS,
    RUN,
    assert_whole_curve,
    call_main,
    error_line,
    finish,
    flags,
    read_checkpoint,
    read_scalars,
    resume,
    start,
    wait_for_checkpoint,
)

STOPPING = "stopping: waiting for this iteration to end, then saving; once more stops at once"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- Signals ----


def test_live_line_and_ctrl_c(folder: Path) -> None:
    """In a terminal one line is rewritten in place. Ctrl-C is answered, ends the iteration, saves and says what next."""
    terminal, inner = pty.openpty()
    process = start(ENTROPY, flags(1, *ENDLESS), folder, stdout=inner, env=ENVIRONMENT | {"COLUMNS": "160"})
    os.close(inner)
    output, stopped = "", False
    while True:
        try:
            output += os.read(terminal, 4096).decode()
        except OSError:  # the other side is closed
            break
        if not stopped and output.count("learning") == 2:
            process.send_signal(signal.SIGINT)
            stopped = True
    os.close(terminal)
    status, _, err = finish(process)
    assert (status, err) == (130, f"\n{STOPPING}\n")

    _, *lines, end = output.replace("\r\n", "\n").split("\r")
    last_line, end = end.split("\n", 1)
    last = read_checkpoint(RUN)["counters"]["global_step"]
    assert last >= 2 * BATCH
    assert end == f"stopped at step {last:,}; go on with: python {ROOT / ENTROPY}.py --resume runs/run\n"
    numbers = r"([\d,]+) / 1,000,000,000 steps"
    more = r" \| [\d,]+ steps/s \| [\w ,:]+ left \| return - \| rooms 1 \| r_int \d\.\d{4}"
    shown = [re.fullmatch(rf"{numbers}(?:{more})? \| (\w+)\x1b\[K", line).groups() for line in [*lines, last_line]]
    steps = [f"{step:,}" for step in range(0, last, BATCH)]
    expected = [(step, doing) for step in steps for doing in ("playing", "learning")]
    assert shown == [*expected, (f"{last:,}", "saving")]
    assert_whole_curve(RUN, last // BATCH)


def test_live_line_in_a_narrow_terminal(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is cut, for a line that wraps could not be rewritten."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    snd.Progress(make_args(snd, total_timesteps=10**9), 0).show("playing")
    assert re.fullmatch(r"\r.{19}\x1b\[K", capsys.readouterr().out)


def test_second_ctrl_c_leaves_at_once(folder: Path) -> None:
    """In the middle of an iteration, in which the first was answered; the old checkpoint stays as it is."""
    process = start(SND, flags(1, *ENDLESS, "--num-envs", "1", "--num-steps", "100000"), folder)
    wait_for_checkpoint(process, RUN)
    before = (RUN / "checkpoint.pt").read_bytes()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() + process.stderr.readline() == f"\n{STOPPING}\n"
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert (status, err) == (-signal.SIGINT, "")
    assert "0 / 1,000,000,000 steps | playing" in out and "stopped" not in out
    assert (RUN / "checkpoint.pt").read_bytes() == before


def test_ctrl_c_before_training(
    snd: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line, and nothing is left behind."""
    monkeypatch.setattr(snd, "init_obs_stats", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert call_main(snd, flags(1)) == 130
    assert error_line(capsys) == "ppo_snd_atari: stopped before training began; nothing was written"
    assert not list(folder.iterdir())


# ---- Disks ----


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread tells, too
@pytest.mark.parametrize("file", ["checkpoint.tmp", "events"])
def test_full_disk(
    snd: ModuleType, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The run ends and says why, and its last checkpoint is as it was."""
    assert call_main(snd, flags(1)) == 0
    before, update = (RUN / "checkpoint.pt").read_bytes(), snd.update

    def fill_and_update(*given: object) -> dict:
        for path in [RUN / file] if file == "checkpoint.tmp" else list(RUN.glob("events*")):
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/full")
        return update(*given)

    monkeypatch.setattr(snd, "update", fill_and_update)
    capsys.readouterr()
    assert call_main(snd, resume(3)) in (1, 2)
    err = capsys.readouterr().err
    assert re.fullmatch(r"ppo_snd_atari: .*No space left on device.*", err.splitlines()[-1])
    assert err.count("\n") == 1 or file == "events"
    assert (RUN / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("obstacle", ["runs", "runs/run"])
def test_file_in_the_place_of_the_folder(
    snd: ModuleType, obstacle: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """The folder of a run cannot be made: one line, and the file stays."""
    Path(obstacle).parent.mkdir(exist_ok=True)
    Path(obstacle).write_text("mine")
    assert call_main(snd, flags(1)) == 2
    assert "runs/run" in error_line(capsys)
    assert Path(obstacle).read_text() == "mine"


# ---- Numbers ----

NOT_FINITE = {"reward": "step 64: losses/policy_loss is nan", "loss": "step 64: losses/distillation is inf"}
NOT_FINITE["weight"] = "a weight is not finite"


@pytest.mark.parametrize("quantity", NOT_FINITE)
def test_number_that_is_not_finite(
    snd: ModuleType, quantity: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The run stops and names it; the log has the last numbers, and the checkpoint is the last good one."""
    intrinsic_rewards, update, iterations = snd.intrinsic_rewards, snd.update, []

    def poisoned_rewards(*given: object) -> torch.Tensor:
        iterations.append(rewards := intrinsic_rewards(*given))
        if quantity == "reward" and len(iterations) == 2:
            rewards[0, 0] = torch.nan
        return rewards

    def poisoned_update(*given: object) -> dict:
        losses = update(*given)
        if quantity == "loss" and len(iterations) == 2:
            losses["distillation"] /= 0
        if quantity == "weight" and len(iterations) == 2:
            learner = given[3].args[0]  # train_policy is bound to it
            learner.predictor.layers[2].weight.data[0] = torch.nan
        return losses

    monkeypatch.setattr(snd, "intrinsic_rewards", poisoned_rewards)
    monkeypatch.setattr(snd, "update", poisoned_update)
    assert call_main(snd, flags(4, "--checkpoint-interval", "1")) == 1
    kept = "; the last good checkpoint is kept in runs/run"
    assert error_line(capsys) == f"ppo_snd_atari: {NOT_FINITE[quantity]}{kept}"
    assert_whole_curve(RUN, 2)
    state = read_checkpoint(RUN)
    assert state["counters"]["global_step"] == BATCH
    assert all(weights.isfinite().all() for weights in state["learner"].values())


def test_diverging_run(snd: ModuleType, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """The real thing."""
    assert call_main(snd, flags(9, "--learning-rate", "1e12")) == 1
    assert "the last good checkpoint is kept in runs/run" in error_line(capsys)
    assert read_checkpoint(RUN)["counters"]["global_step"] == 0
    assert not all(np.isfinite(points[-1][1]) for points in read_scalars(RUN).values())


def test_lone_row_is_not_taken_for_a_fault(snd: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step beside a reset row has no deviation; that is no reason to stop."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 3)
    assert call_main(snd, flags(1, "--num-envs", "1", "--num-steps", "2", "--total-timesteps", "8")) == 0


# ---- Memory ----


def test_absurd_size(snd: ModuleType, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """147 TB of frames, more than a processor can address: one line, and nothing is left behind."""
    assert call_main(snd, flags(1, "--num-steps", "1000000000", "--total-timesteps", "1e11")) == 1
    line = error_line(capsys)
    assert "out of memory" in line and "try fewer --num-envs" in line
    assert not list(folder.iterdir())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory(
    snd: ModuleType, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its many names: PyTorch's allocator, CUDA graphs, cuBLAS, C++; also where it hides behind another error."""

    def out_of_memory() -> None:
        raise error

    def hidden() -> None:
        try:
            raise error
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    for main in (out_of_memory, hidden):
        monkeypatch.setattr(snd, "main", main)
        assert call_main(snd, []) == 1
        assert "out of memory" in error_line(capsys)


def test_other_errors_keep_their_traceback(snd: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As someone who changes a copy needs it."""
    monkeypatch.setattr(snd, "main", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        call_main(snd, [])


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


def bytes_in_use() -> int:
    """What malloc has handed out and not got back, tensors included; the heap's gaps, unlike in RSS, do not count."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def test_nothing_piles_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 20 iterations memory, open files and threads stay flat, and the log of 128 M steps is below 20 MB."""
    script, used, log_sizes = importlib.import_module(ENTROPY), [], []
    log = script.log

    def measure(writer: object, scalars: dict, step: int) -> None:
        log(writer, scalars | {"charts/episodic_return": 1.0, "charts/episodic_length": 1.0}, step)
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        used.append((bytes_in_use(), sys.getallocatedblocks(), files, threads))
        log_sizes.append(sum(path.stat().st_size for path in RUN.glob("events*")))

    monkeypatch.setattr(script, "log", measure)
    gc.collect()  # what other tests have left behind
    assert call_main(script, flags(20, "--checkpoint-interval", "5")) == 0
    memory, objects, files, threads = zip(*used[6:], strict=True)
    print(f"memory within {np.ptp(memory)} bytes, objects within {np.ptp(objects)}")
    assert np.ptp(memory) < 400e3, memory
    assert np.ptp(objects) < 10_000, objects
    assert len(set(files)) == len(set(threads)) == 1
    bytes_per_iteration = (log_sizes[-1] - log_sizes[0]) / 19
    assert 128_000_000 / (128 * 128) * bytes_per_iteration < 20e6
