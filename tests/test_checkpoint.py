"""Checkpoints and --resume, on real runs and on files from elsewhere."""

import importlib
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


def test_resume_equals_an_uninterrupted_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopping changes nothing but the games: with new ones at that point, all is equal bit for bit."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stopped.mkdir()
    monkeypatch.chdir(stopped)
    assert call_main(script, flags(1, "--norm-int-reward")) == 0
    assert call_main(script, resume(2)) == 0
    whole.mkdir()
    monkeypatch.chdir(whole)
    start_new_games(script, monkeypatch)
    assert call_main(script, flags(2, "--norm-int-reward")) == 0
    assert_equal(read_checkpoint(stopped / RUN), read_checkpoint(whole / RUN))
    assert read_scalars(stopped / RUN, speed=False) == read_scalars(whole / RUN, speed=False)
    assert_whole_curve(stopped / RUN, 2)


def start_new_games(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second iteration begin with the games, and the memory of the games, of a run resumed there."""
    collect_rollout, iteration = script.collect_rollout, 0

    def collect(envs: object, act: Callable, obs: torch.Tensor, args: object) -> object:
        nonlocal iteration
        iteration += 1
        if iteration == 2:
            new = script.AtariEnvs(args, int(np.random.SeedSequence([args.seed, BATCH]).generate_state(1)[0] >> 2))
            new.rooms |= envs.rooms
            vars(envs).update(vars(new))
            for _ in range(8):  # the warm-up, from which nothing is learned
                collect_rollout(envs, act, obs, args)
            envs.finished.clear()
        return collect_rollout(envs, act, obs, args)

    monkeypatch.setattr(script, "collect_rollout", collect)
    if script.__name__ == ENTROPY:
        rewards = script.entropy_rewards

        def forget(learner: object, rollout: object, ring: object, args: object) -> torch.Tensor:
            return rewards(learner, rollout, script.FeatureRing(ring.size), args)

        monkeypatch.setattr(script, "entropy_rewards", forget)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder above the runs/run of an SND run of one iteration."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call_main(importlib.import_module(SND), flags(1)) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """That run in the working folder; returns its checkpoint."""
    shutil.copytree(trained, tmp_path / "copy", copy_function=os.link)  # a new checkpoint replaces the file
    monkeypatch.chdir(tmp_path / "copy")
    return read_checkpoint(RUN)


def write_checkpoint(state: object) -> None:
    """Replace the run's checkpoint, of which other tests hold links."""
    (RUN / "checkpoint.pt").unlink()
    torch.save(state, RUN / "checkpoint.pt")


def test_rooms_and_scores_go_on(run: dict, snd: ModuleType) -> None:
    """A resumed run counts on from the rooms and the last 100 scores of its checkpoint."""
    run["counters"] |= {"rooms": [1, 7], "scores": [float(score) for score in range(150)]}
    write_checkpoint(run)
    assert call_main(snd, resume(2)) == 0
    counters = {"global_step": 2 * BATCH, "rooms": [1, 7], "scores": [float(score) for score in range(50, 150)]}
    assert read_checkpoint(RUN)["counters"] == counters
    assert read_scalars(RUN)["charts/explored_rooms"] == [(BATCH, 1), (2 * BATCH, 2)]


def test_changed_learning_rate(run: dict, snd: ModuleType) -> None:
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


def test_changed_number_of_games(run: dict, snd: ModuleType) -> None:
    """Iterations of another size go on where the old ones ended."""
    assert call_main(snd, resume(3, "--num-envs", "8")) == 0
    assert read_checkpoint(RUN)["counters"]["global_step"] == 3 * BATCH
    assert [step for step, _ in read_scalars(RUN)["losses/value_loss"]] == [BATCH, 3 * BATCH]


def test_other_model_is_refused(run: dict, snd: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """Its networks do not fit; the run stays as it was."""
    before = sorted(RUN.iterdir())
    assert call_main(snd, resume(2, "--model", "B")) == 2
    assert "the checkpoint does not fit these arguments" in error_line(capsys)
    assert sorted(RUN.iterdir()) == before
    assert_equal(read_checkpoint(RUN), run)


def test_finished_run_says_so(
    run: dict, snd: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Before anything is built, and what goes on with it; exit status 0."""
    monkeypatch.setattr(snd, "AtariEnvs", lambda *_, **__: pytest.fail("something was built"))
    assert call_main(snd, ["--resume", "runs/run"]) == 0
    assert capsys.readouterr() == ("runs/run is finished: 32 steps; to go on, raise --total-timesteps\n", "")


def test_existing_run_name_is_refused(run: dict, snd: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """A new run never writes over an old one."""
    assert call_main(snd, flags(2)) == 2
    assert "runs/run holds a run already: go on with --resume runs/run" in error_line(capsys)
    assert_equal(read_checkpoint(RUN), run)


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
def test_file_from_elsewhere_is_refused(
    make: Callable, tmp_path: Path, snd: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line that names the file and the script, exit status 2; no code in it runs and nothing is written."""
    monkeypatch.chdir(tmp_path)
    RUN.mkdir(parents=True)
    path = RUN / "checkpoint.pt"
    torch.save(SMALL, path)
    make(path)
    assert call_main(snd, resume(2)) == 2
    line = error_line(capsys)
    assert line.startswith("ppo_snd_atari: runs/run/checkpoint.pt is not a checkpoint of ppo_snd_atari: ")
    assert RND in line or make is not FILES["another script's"]
    assert [*tmp_path.iterdir()] == [tmp_path / "runs"] and [*RUN.iterdir()] == [path]


def kill_many_times(script: str, kills: int, folder: Path) -> None:
    """Kill -9 and resume a run, every other time inside the write of a checkpoint."""
    run_dir, rng = folder / RUN, random.Random(script)
    path, temporary = run_dir / "checkpoint.pt", run_dir / "checkpoint.tmp"
    arguments, last, newest = [*flags(1, "--checkpoint-interval", "2"), *ENDLESS], 0, 0
    for kill in range(kills + 1):
        process = start(script, arguments, folder)
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


def test_killed_run_goes_on(tmp_path: Path) -> None:
    """After a kill -9 at any instant the counters, statistics, optimisers and curves fit together."""
    kill_many_times(SND, 2, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("script", SCRIPTS)
def test_run_killed_twenty_times_goes_on(script: str, tmp_path: Path) -> None:
    """The same twenty times with each script."""
    kill_many_times(script, 20, tmp_path)
