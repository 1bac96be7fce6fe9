"""The throughput benchmark: it runs the scripts themselves, its parts add up, and it leaves everything as it was."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import throughput
from conftest import ENTROPY, RND, ROOT

TINY = ["--model", "A", "--num-envs", "2", "--num-steps", "4", "--num-minibatches", "1", "--update-epochs", "1"]


def run(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark" / "throughput.py"), *TINY, *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("script", "backend"), [(RND, "gymnasium"), (ENTROPY, "envpool")])
def test_measures_a_real_run(script: str, backend: str, tmp_path: Path) -> None:
    flags = ["--script", script, "--env-backend", backend, "--no-cuda", "--iterations", "3"]
    done = run(*flags, "--out", "speed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]  # the run itself was elsewhere
    figures = json.loads((tmp_path / "speed.json").read_text())
    iterations, rates = figures["iterations"], figures["steps_per_second"]
    assert len(iterations) == 2  # without the first
    for parts in iterations:
        assert min(parts.values()) > 0, parts
        assert 2 * parts["total"] == pytest.approx(sum(parts.values()))
    assert rates["environments alone"] == pytest.approx(8 / median(figures["raw_environment_seconds"]))
    assert rates["update alone"] == pytest.approx(8 / median(parts["update"] for parts in iterations))
    assert rates["training"] < min(rates["rollout alone"], rates["update alone"])
    assert figures["training_to_raw_environment"] == pytest.approx(rates["training"] / rates["environments alone"])
    assert figures["peak_host_bytes"] > 2**28  # torch alone takes more
    assert all(name in done.stdout for name in rates) and "the median of 2 iterations" in done.stdout
    assert figures["args"]["env_backend"] == backend and figures["args"]["num_steps"] == 4
    assert "/tmp" not in done.stdout + done.stderr and "runs/" not in done.stdout + done.stderr  # gone by now


def test_iteration_parts_against_hand_made_calls() -> None:
    calls = [("AtariEnvs.recv", 0, 5), ("AtariEnvs.send", 11, 12), ("AtariEnvs.recv", 13, 14)]
    calls += [("collect_rollout", 10, 15), ("update_obs_stats", 15, 16), ("intrinsic_rewards", 16, 18)]
    calls += [("estimate_advantages", 18, 18.5), ("update", 18.5, 28.5), ("log", 29, 30)]
    expected = {"environment": 2, "inference": 3, "novelty rewards": 3, "advantages (GAE)": 0.5, "update": 10}
    assert throughput.iteration_parts(calls) == [expected | {"logging": 1, "rest": 0.5, "total": 20}]


@pytest.mark.parametrize("flags", [["--no-cuda", "--iterations", "1"], ["--out", ".."], ["--env-id", "Nope-v5"]])
def test_user_errors_are_one_line_and_status_2(flags: list[str], tmp_path: Path) -> None:
    done = run(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and flags[-1] in done.stderr
    assert not list(tmp_path.iterdir())
