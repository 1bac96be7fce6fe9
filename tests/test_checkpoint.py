"""Checkpoints and --resume, on real runs and on files from elsewhere."""

import os
import pickle
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ENTROPY, RND, SCRIPTS, SND
from running import (
    BATCH,
    ENDLESS,
    RUN,
    assert_equal,
    assert_whole_curve,
    call_main,
    error_line,
    finish,
    flags,
    read_checkpoint,
    read_scalars,
    resume,
    start,
    wait_until,
)

import ppo_snd_atari as snd


def test_resume_equals_an_uninterrupted_run(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopping changes nothing but the games: with new ones at that point, all is equal bit for bit."""
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 5)  # games end while a resumed run warms up, and later
    assert call_main(script, flags(1, "--norm-int-reward")) == 0
    assert call_main(script, resume(2)) == 0
    start_new_games(script, monkeypatch)
    assert call_main(script, flags(2, "--norm-int-reward", "--run-name", "whole")) == 0
    stopped, whole = read_checkpoint(RUN), read_checkpoint(RUN.with_name("whole"))
    assert stopped["args"].pop("run_name") != whole["args"].pop("run_name")
    assert_equal(stopped, whole)
    assert read_scalars(RUN, speed=False) == read_scalars(RUN.with_name("whole"), speed=False)
    assert_whole_curve(RUN, 2)


def start_new_games(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second iteration begin with the games, and the memory of the games, of a run resumed there."""
    collect_rollout, iterations = script.collect_rollout, []
    ring = script.FeatureRing(128) if script.__name__ == ENTROPY else None

    def collect(envs: object, act: Callable, obs: torch.Tensor, args: object) -> object:
        iterations.append(envs)
        if len(iterations) == 2:
            new = script.AtariEnvs(args, int(np.random.SeedSequence([args.seed, BATCH]).generate_state(1)[0] >> 2))
            vars(envs).update(vars(new) | {"rooms": envs.rooms})
            for _ in range(8):  # the warm-up: nothing is learned, but what they have seen of these games is remembered
                rollout = collect_rollout(envs, act, obs, args)
                if ring:
                    rewards(act.args[0], rollout, ring, args)
            envs.finished.clear()
        return collect_rollout(envs, act, obs, args)

    monkeypatch.setattr(script, "collect_rollout", collect)
    if ring:
        rewards = script.entropy_rewards

        def of_these_games(learner: object, rollout: object, old_ring: object, args: object) -> torch.Tensor:
            return rewards(learner, rollout, ring if len(iterations) == 2 else old_ring, args)

        monkeypatch.setattr(script, "entropy_rewards", of_these_games)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder above the runs/run of an SND run of one iteration."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call_main(snd, flags(1)) == 0
    return folder


@pytest.fixture
def run(trained: Path, folder: Path) -> dict:
    """That run in the working folder; returns its checkpoint."""
    shutil.copytree(trained, folder, copy_function=os.link, dirs_exist_ok=True)  # a new checkpoint replaces the file
    return read_checkpoint(RUN)


def write_checkpoint(state: object) -> None:
    """Replace the run's checkpoint, of which other tests hold links."""
    (RUN / "checkpoint.pt").unlink()
    torch.save(state, RUN / "checkpoint.pt")


def test_counters_go_on(run: dict, monkeypatch: pytest.MonkeyPatch):
    """From the steps, rooms and last 100 scores of the checkpoint, also with another number of games.

    Rooms found while a resumed run warms up are not counted.
    """
    collect_rollout, rollouts = snd.collect_rollout, []

    def collect(envs: object, *given: object) -> object:
        rollouts.append(envs)
        if len(rollouts) <= 8:
            envs.rooms.add(99)
        return collect_rollout(envs, *given)

    monkeypatch.setattr(snd, "collect_rollout", collect)
    run["counters"] |= {"rooms": [1, 7], "scores": [*range(150)]}
    write_checkpoint(run)
    assert call_main(snd, resume(3, "--num-envs", "8")) == 0
    counters = {"global_step": 3 * BATCH, "rooms": [1, 7], "scores": [*range(50, 150)]}
    assert read_checkpoint(RUN)["counters"] == counters
    assert read_scalars(RUN)["charts/explored_rooms"] == [(BATCH, 1), (3 * BATCH, 2)]


def test_changed_learning_rate(run: dict):
    """With ten times the rate the first step is ten times as long, for the moments come from the file."""
    steps = []
    for changed in ([], ["--learning-rate", "0.001"]):
        write_checkpoint(run)
        assert call_main(snd, resume(2, *changed)) == 0
        state, before = read_checkpoint(RUN), run["learner"]
        names = [name for name in before if re.fullmatch(r"(agent|target)\..*bias", name)]
        steps.append({name: state["learner"][name] - before[name] for name in names})
    for name, step in steps[0].items():
        assert step.any()
        torch.testing.assert_close(steps[1][name], 10 * step, rtol=1e-3, atol=1e-7)
    assert {moments["step"].item() for state in state["optimizers"].values() for moments in state.values()} == {2}
    assert state["args"]["learning_rate"] == 1e-3
    assert read_scalars(RUN)["charts/learning_rate"][-1] == (2 * BATCH, pytest.approx(1e-3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (resume(2, "--model", "B"), "the checkpoint does not fit these arguments"),
        (flags(2), "runs/run holds a run already: go on with --resume runs/run"),
    ],
)
def test_run_is_not_spoilt(run: dict, arguments: list[str], words: str, capsys: pytest.CaptureFixture):
    """By networks that do not fit, nor by a new run of its name: the folder stays as it was."""
    before = sorted(RUN.iterdir())
    assert call_main(snd, arguments) == 2
    assert words in error_line(capsys)
    assert sorted(RUN.iterdir()) == before
    assert_equal(read_checkpoint(RUN), run)


def test_finished_run_says_so(run: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Before anything is built, and what goes on with it; exit status 0."""
    monkeypatch.setattr(snd, "AtariEnvs", lambda *_, **__: pytest.fail("something was built"))
    assert call_main(snd, ["--resume", "runs/run"]) == 0
    assert capsys.readouterr() == ("runs/run is finished: 32 steps; to go on, raise --total-timesteps\n", "")


class Touch:
    """Pickled code: makes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch proof",)


SMALL = {"script": SND, "args": {}, "counters": {}, "learner": {}, "optimizers": {}, "random": {}}
FILES = {
    "another script's": lambda path: torch.save(SMALL | {"script": RND}, path),
    "unknown argument": lambda path: torch.save(SMALL | {"args": {"sur\nprise": 1}}, path),
    "a state_dict": lambda path: torch.save({"weight": torch.zeros(2)}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "random bytes": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: torch.save(SMALL | {"counters": Touch()}, path),
    "code, old format": lambda path: torch.save(Touch(), path, _use_new_zipfile_serialization=False),
    "code, plain pickle": lambda path: path.write_bytes(pickle.dumps(Touch(), protocol=2)),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_file_from_elsewhere_is_refused(make: Callable, folder: Path, capsys: pytest.CaptureFixture):
    """One line that names the file and the script, exit status 2; no code in it runs and nothing is written."""
    RUN.mkdir(parents=True)
    path = RUN / "checkpoint.pt"
    torch.save(SMALL, path)
    make(path)
    assert call_main(snd, resume(2)) == 2
    line = error_line(capsys)
    assert line.startswith("ppo_snd_atari: runs/run/checkpoint.pt is not a checkpoint of ppo_snd_atari: ")
    assert RND in line or make is not FILES["another script's"]
    assert [*folder.iterdir()] == [folder / "runs"] and [*RUN.iterdir()] == [path]


TORTURE = [pytest.param(script, 20, marks=pytest.mark.torture) for script in SCRIPTS]


@pytest.mark.parametrize(("script", "kills"), [(SND, 2), *TORTURE])
def test_killed_run_goes_on(script: str, kills: int, tmp_path: Path):
    """After a kill -9 at any instant, every other time inside the write of a checkpoint, all that goes on fits."""
    run_dir, rng = tmp_path / RUN, random.Random(script)
    path, temporary = run_dir / "checkpoint.pt", run_dir / "checkpoint.tmp"
    arguments, last, newest = [*flags(1, "--checkpoint-interval", "2"), *ENDLESS], 0, 0
    for kill in range(kills + 1):
        process = start(script, arguments, tmp_path)
        wait_until(lambda old=newest: path.exists() and path.stat().st_mtime_ns > old, process)
        if kill == kills:
            process.send_signal(signal.SIGTERM)
            status, _, errors = finish(process)
            assert status == 128 + signal.SIGTERM and "Traceback" not in errors
        else:
            time.sleep(2 * rng.random())
            if kill % 2:
                wait_until(lambda: temporary.exists() and temporary.stat().st_size > 0, process)
            process.kill()
            process.communicate()

        state, newest = read_checkpoint(run_dir), path.stat().st_mtime_ns
        iteration = state["counters"]["global_step"] // BATCH
        assert iteration > last or kill == 0
        for optimizer in state["optimizers"].values():
            assert all(moments["step"].item() == iteration for moments in optimizer.values())
        frames = state["learner"]["obs_stats.count"].item()
        assert 0.9 * (2 + 8 * iteration) * 4 <= frames <= (2 + 8 * iteration) * 4
        last, arguments = iteration, ["--resume", "runs/run"]
    assert_whole_curve(run_dir, last)
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"checkpoint", "events"}
    assert not temporary.exists()
