"""The throughput benchmark: it runs the scripts themselves, its parts add up, and it leaves everything as it was."""

import re
from pathlib import Path

import pytest
import throughput
from conftest import ENTROPY, RND, run_script
from running import BATCH, TINY


@pytest.mark.parametrize(("script", "backend"), [(RND, "gymnasium"), (ENTROPY, "envpool")])
def test_measures_a_real_run(script: str, backend: str, tmp_path: Path):
    flags = [*TINY, "--script", script, "--env-backend", backend, "--iterations", "3"]
    done = run_script("benchmark/throughput", flags, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())  # the run itself was elsewhere
    figures = re.findall(r"^(.{38}) *([\d,.]+)", done.stdout, re.M)
    figures = {name.strip(): float(number.replace(",", "")) for name, number in figures}
    environments, rollout, update, training, share, *parts = list(figures.values())
    *parts, total, _, host_gib = parts
    assert training <= min(rollout, update)  # all of them rounded
    assert share == pytest.approx(100 * training / environments, abs=0.06 + 51 / environments)
    assert len(parts) == len(throughput.PARTS) and total == pytest.approx(sum(parts), rel=0.2)  # of medians
    assert BATCH / update == pytest.approx(figures["update"], rel=1 / update, abs=0.001)
    assert host_gib > 0.25  # torch alone takes more
    assert f"{script}, model A, 4 envs x 8 steps, 1 minibatches x 1 epochs, {backend}" in done.stdout
    assert "the median of 2 iterations; the first one" in done.stdout
    assert "/tmp" not in done.stdout + done.stderr and "runs/" not in done.stdout + done.stderr  # gone by now


def test_parts_of_a_hand_made_iteration():
    measured = {"AtariEnvs.send": 1, "AtariEnvs.recv": 1, "collect_rollout": 5, "update_obs_stats": 1, "update": 10}
    measured |= {"intrinsic_rewards": 2, "estimate_advantages": 0.5, "log": 1, "start": 10, "end": 30}
    expected = {"environment": 2, "inference": 3, "novelty rewards": 3, "advantages (GAE)": 0.5, "update": 10}
    parts = throughput.parts_of(throughput.Counter(measured))
    assert parts == expected | {"logging": 1, "rest": 0.5, "total": 20}


@pytest.mark.parametrize("flags", [["--iterations", "1"], ["--env-id", "Nope-v5"]])
def test_user_errors_are_one_line_and_status_2(flags: list[str], tmp_path: Path):
    done = run_script("benchmark/throughput", [*TINY, *flags], tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and flags[-1] in done.stderr
    assert not list(tmp_path.iterdir())
