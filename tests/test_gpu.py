"""What only a GPU can show: recordings compute what plain calls do, and the flags and tools for a GPU work on one."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, SND, run_script
from running import RUN, TINY, assert_equal, call_main, flags, read_checkpoint, read_scalars

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TINY_GPU = [flag for flag in flags(3) if flag != "--no-cuda"]


def test_recordings_equal_plain_calls(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three iterations, in which functions are called, recorded and replayed: equal bit for bit."""
    saved, logged = [], []
    for kind in ("recorded", "plain"):
        (folder := tmp_path / kind).mkdir()
        monkeypatch.chdir(folder)
        if kind == "plain":
            monkeypatch.setattr(script, "recorded", lambda function, device: function)
        assert call_main(script, [*TINY_GPU, "--num-minibatches", "4", "--update-proportion", "0.25"]) == 0
        saved.append(read_checkpoint(RUN))
        logged.append(read_scalars(RUN, speed=False))
    assert saved[0]["random"].keys() == {"cuda"}
    assert_equal(saved[0], saved[1])
    assert logged[0] == logged[1]


@pytest.mark.parametrize("more", [["--compile"], ["--no-bf16", "--ext-coef", "0", "--int-coef", "0"]])
def test_flags(more: list[str], tmp_path: Path) -> None:
    """What is logged was finite, or the run would have failed."""
    process = run_script(SND, [*TINY_GPU, *more], tmp_path)
    assert process.returncode == 0, process.stderr
    assert " on cuda" in process.stdout.splitlines()[0]


def test_throughput(tmp_path: Path) -> None:
    """The tool runs twice, and shows the memory of the GPU."""
    tiny = [flag for flag in TINY if flag != "--no-cuda"]
    command = [sys.executable, str(ROOT / "benchmark/throughput.py"), *tiny, "--iterations", "4"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "peak GPU memory" in process.stdout and "the median of 2 iterations; the first two" in process.stdout
