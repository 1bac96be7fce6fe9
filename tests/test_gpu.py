"""What only a GPU can show: recordings compute what plain calls do, and the flags and tools for a GPU work on one."""

import shutil
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


def test_recordings_equal_plain_calls(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Three iterations, in which functions are called, recorded and replayed: equal bit for bit."""
    arguments = [*TINY_GPU, "--num-minibatches", "4", "--update-proportion", "0.25"]
    assert call_main(script, arguments) == 0
    recorded, logged = read_checkpoint(RUN), read_scalars(RUN, speed=False)
    shutil.rmtree(RUN)
    monkeypatch.setattr(script, "recorded", lambda function, device: function)
    assert call_main(script, arguments) == 0
    assert recorded["random"].keys() == {"cuda"}
    assert_equal(recorded, read_checkpoint(RUN))
    assert logged == read_scalars(RUN, speed=False)


@pytest.mark.parametrize("more", [["--compile"], ["--no-bf16", "--ext-coef", "0", "--int-coef", "0"]])
def test_flags(more: list[str], tmp_path: Path):
    """What is logged was finite, or the run would have failed."""
    process = run_script(SND, [*TINY_GPU, *more], tmp_path)
    assert process.returncode == 0, process.stderr
    assert " on cuda" in process.stdout.splitlines()[0]


def test_throughput(tmp_path: Path):
    """The tool runs twice, and shows the memory of the GPU."""
    tiny = [flag for flag in TINY if flag != "--no-cuda"]
    command = [sys.executable, str(ROOT / "benchmark/throughput.py"), *tiny, "--iterations", "4"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "peak GPU memory" in process.stdout and "the median of 2 iterations; the first two" in process.stdout
