"""Signals and the live line, disks, numbers that are not finite, memory, and what a long run must not pile up."""

import gc
import importlib
import os
import pty
import re
import resource
import signal
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ENTROPY, ENVIRONMENT, ROOT, SND
from running import (
    BATCH,
    ENDLESS,
    PATIENCE,
    RUN,
    assert_whole_curve,
    call_main,
    error_line,
    finish,
    flags,
    read_checkpoint,
    read_terminal,
    resume,
    start,
)

import ppo_snd_atari as snd

STOPPING = "stopping: waiting for this iteration to end, then saving; once more stops at once"


# ---- Signals ----


def test_live_line_and_ctrl_c(folder: Path):
    """In a terminal one line is rewritten in place. Ctrl-C is answered at once; the run ends with a checkpoint."""
    terminal, inner = pty.openpty()
    process = start(ENTROPY, flags(1, *ENDLESS), folder, stdout=inner, env=ENVIRONMENT | {"COLUMNS": "160"})
    os.close(inner)
    output = read_terminal(terminal, "learning.*learning")
    process.send_signal(signal.SIGINT)
    output += read_terminal(terminal)
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
    shown = [re.fullmatch(rf"(\w+) \| {numbers}(?:{more})?\x1b\[K", line).groups() for line in [*lines, last_line]]
    steps = [f"{step:,}" for step in range(0, last, BATCH)]
    expected = [(doing, step) for step in steps for doing in ("playing", "learning")]
    assert shown == [*expected, ("saving", f"{last:,}")]
    assert_whole_curve(RUN, last // BATCH)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_leaves_at_once(second: signal.Signals, folder: Path):
    """In the middle of an iteration, in which the first was answered; the old checkpoint stays as it is."""
    process = start(SND, flags(1, *ENDLESS, "--num-envs", "1", "--num-steps", "100000"), folder)
    assert any("playing | 0 / 1,000,000,000 steps" in line for line in process.stdout)
    before = (RUN / "checkpoint.pt").read_bytes()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() + process.stderr.readline() == f"\n{STOPPING}\n"
    process.send_signal(second)
    assert finish(process) == (-second, "", "")
    assert (RUN / "checkpoint.pt").read_bytes() == before


def test_reader_of_the_output_is_gone(folder: Path):
    """Ctrl-C ends `tee`, too: the run is saved all the same, and the status is that of a run that was stopped."""
    process = start(SND, flags(1, *ENDLESS), folder)
    assert any("playing | 0 / 1,000,000,000 steps" in line for line in process.stdout)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == f"\n{STOPPING}\n"
    assert process.wait(PATIENCE) == 130
    assert read_checkpoint(RUN)["counters"]["global_step"] >= BATCH


def test_ctrl_c_before_training(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """One line, and nothing is left behind, or on resuming what was there."""
    stopped = "ppo_snd_atari: stopped before training began; nothing was written"
    init_obs_stats = snd.init_obs_stats
    monkeypatch.setattr(snd, "init_obs_stats", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert call_main(snd, flags(1)) == 130
    assert error_line(capsys) == stopped
    assert not list(folder.iterdir())

    monkeypatch.setattr(snd, "init_obs_stats", init_obs_stats)
    assert call_main(snd, flags(1)) == 0
    before = sorted((path.name, path.read_bytes()) for path in RUN.iterdir())
    monkeypatch.setattr(snd, "collect_rollout", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert call_main(snd, resume(2)) == 130
    assert error_line(capsys) == stopped
    assert sorted((path.name, path.read_bytes()) for path in RUN.iterdir()) == before


# ---- Disks ----


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread tells, too
@pytest.mark.parametrize("file", ["checkpoint", "events"])
def test_full_disk(file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """It fills up in the middle of a file: the run ends and says why, and its last checkpoint is as it was."""
    assert call_main(snd, flags(1)) == 0
    before, update, limits = (RUN / "checkpoint.pt").read_bytes(), snd.update, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_and_update(*given: object) -> dict:
        if file == "checkpoint":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, limits[1]))
        for path in RUN.glob("events*") if file == "events" else ():
            path.unlink()
            path.symlink_to("/dev/full")
        return update(*given)

    monkeypatch.setattr(snd, "update", fill_and_update)
    capsys.readouterr()
    try:
        assert call_main(snd, resume(3)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert re.fullmatch(r"ppo_snd_atari: .*(File too large|No space left|disk).*", err.splitlines()[-1])
    assert err.count("\n") == 1 or file == "events"
    assert (RUN / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("obstacle", ["runs", "runs/run"])
def test_file_in_the_place_of_the_folder(obstacle: str, folder: Path, capsys: pytest.CaptureFixture):
    """The folder of a run cannot be made: one line, and the file stays."""
    Path(obstacle).parent.mkdir(exist_ok=True)
    Path(obstacle).write_text("mine")
    assert call_main(snd, flags(1)) == 2
    assert "runs/run" in error_line(capsys)
    assert Path(obstacle).read_text() == "mine"


# ---- Numbers ----


@pytest.mark.parametrize("named", [r"step 64: losses/\w+ is (nan|inf)", "a weight is not finite"])
def test_number_that_is_not_finite(
    named: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The run stops and names it; the log has the last numbers, and the checkpoint is the last good one."""
    update, iterations = snd.update, []

    def diverging_update(*given: object) -> dict:
        learner = given[3].args[0]  # train_policy is bound to it
        iterations.append(given)
        if len(iterations) == 2 and "step" in named:
            learner.optimizers["target"].param_groups[0]["lr"].fill_(1e12)
        losses = update(*given)
        if len(iterations) == 2:
            learner.predictor.layers[2].weight.data[0] = torch.nan
        return losses

    monkeypatch.setattr(snd, "update", diverging_update)
    assert call_main(snd, flags(4, "--checkpoint-interval", "1")) == 1
    line = error_line(capsys)
    assert re.fullmatch(f"ppo_snd_atari: {named}; the last good checkpoint is kept in runs/run", line)
    assert_whole_curve(RUN, 2)
    state = read_checkpoint(RUN)
    assert state["counters"]["global_step"] == BATCH
    assert all(weights.isfinite().all() for weights in state["learner"].values())


def test_lone_row_is_not_taken_for_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """One step beside a reset row has no deviation; that is no reason to stop."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 3)
    assert call_main(snd, flags(1, "--num-envs", "1", "--num-steps", "2", "--total-timesteps", "8")) == 0


# ---- Memory ----


def test_absurd_size(folder: Path, capsys: pytest.CaptureFixture):
    """147 TB of frames, more than a processor can address: one line, and nothing is left behind."""
    assert call_main(snd, flags(1, "--num-steps", "1000000000", "--total-timesteps", "1e11")) == 1
    line = error_line(capsys)
    assert "out of memory" in line and "lower --num-envs" in line
    assert not list(folder.iterdir())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    MemoryError("std::bad_alloc"),
]
OUT_OF_MEMORY[3].__context__ = OUT_OF_MEMORY[0]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Its many names: PyTorch's allocator, the driver, cuBLAS, the recording of a CUDA graph, C++."""
    monkeypatch.setattr(snd, "main", mock.Mock(side_effect=error))
    assert call_main(snd, []) == 1
    assert "out of memory" in error_line(capsys)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    """As someone who changes a copy needs it."""
    monkeypatch.setattr(snd, "main", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        call_main(snd, [])


def test_nothing_piles_up(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """From iteration to iteration there are as many tensors, open files and threads."""
    script, counts = importlib.import_module(ENTROPY), []
    log = script.log

    def count_and_log(*given: object) -> None:
        log(*given)
        gc.collect()
        tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        counts.append((tensors, len(os.listdir("/proc/self/fd")), threading.active_count()))

    monkeypatch.setattr(script, "log", count_and_log)
    assert call_main(script, flags(5, "--checkpoint-interval", "2")) == 0
    assert counts[1] == counts[2] == counts[3] == counts[4]
