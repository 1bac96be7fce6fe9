"""benchmark/features.py on real checkpoints, its numbers against hand-made features."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import enjoy
import features
import numpy as np
import pytest
import torch
from matplotlib import image
from running import error_of, trained_run
from sklearn.neighbors import KNeighborsClassifier

error_of = partial(error_of, features.main)


@pytest.fixture(scope="session")
def runs() -> dict[str, Path]:
    """An RND and an SND run in a game of many rooms."""
    return {name: trained_run(f"ppo_{name}_atari", "PrivateEye", 2) for name in ("rnd", "snd")}


def load(run: Path, num_envs: int) -> tuple[ModuleType, object, object]:
    """A run's module, learner and arguments for so many games."""
    module, args, checkpoint = enjoy.load_run(run)
    args = replace(args, num_envs=num_envs, seed=1)
    return module, enjoy.load_learner(module, args, checkpoint, 18, torch.device("cpu")), args


def collect(module: ModuleType, learner: object, args: object, *how: object) -> tuple[np.ndarray, np.ndarray]:
    """States and rooms of new games."""
    return features.collect_states(module, learner, args, enjoy.make_envs(module, args, 1), *how)


def test_two_runs_see_the_same_states(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--states", "150", "--every", "12", "--games", "4", "--random-actions", "0.2"]
    features.main([str(runs["rnd"]), str(runs["snd"]), *arguments, "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["game"], record["states"], record["policy"]) == ("PrivateEye", 150, str(runs["snd"]))  # the last run
    assert list(record["runs"]) == [f"ppo_{name}_atari, seed 1, 512 steps" for name in runs]
    rnd, snd = record["runs"].values()
    assert rnd["room_purity_by_chance"] == snd["room_purity_by_chance"] < rnd["room_purity"] <= 1
    assert 0 < rnd["spread_in_rooms"] < 1 and rnd["spread_in_rooms"] != snd["spread_in_rooms"]
    assert rnd["intrinsic_reward"].keys() == snd["intrinsic_reward"].keys()
    assert len(set(snd["intrinsic_reward"].values())) > 1  # RND's are all at the clip
    assert image.imread(tmp_path / "out.png").std() > 0.01 and (tmp_path / "out.svg").stat().st_size > 1000
    text = (tmp_path / "out.md").read_text()
    assert "| ppo_snd_atari, seed 1, 512 steps |" in text and text in capsys.readouterr().out


def test_states_carry_the_room_that_the_emulator_is_in(runs: dict[str, Path]):
    module, learner, args = load(runs["snd"], 1)
    states, rooms = collect(module, learner, args, 60, 1, 1.0)
    envs, rng = module.AtariEnvs(args, 1), np.random.default_rng(1)
    for seen, room in zip(states, rooms, strict=True):  # the same seed, the same random actions: the same game
        assert np.array_equal(seen, envs.next_obs[0][0]) and room == envs.infos[0]["ram"][0, 92]
        rng.random(1)
        envs.send(0, rng.integers(envs.num_actions, size=1).astype(np.int32))
        envs.recv(0)
    assert np.array_equal(collect(module, learner, args, 15, 4, 1.0)[0], states[3::4])


def test_look_against_plain_arithmetic(runs: dict[str, Path]):
    module, learner, args = load(runs["rnd"], 2)
    states, _ = collect(module, learner, args, 20, 3, 1.0)
    seen, rewards = features.look(module, learner, replace(args, int_reward_scale=1e-4), states)  # below the clip
    x = torch.from_numpy(states[:, -1:] / np.float32(256)) - learner.obs_stats.mean.float()
    with torch.no_grad():
        target, predictor = learner.target(x).numpy(), learner.predictor(x).numpy()
    np.testing.assert_allclose(seen, target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rewards, 1e-4 * ((target - predictor) ** 2).sum(axis=1), rtol=1e-3)


def test_numbers_of_known_features():
    rng, rooms = np.random.default_rng(0), np.repeat([0, 1, 2], [40, 30, 20])
    islands = rng.normal(size=(90, 512)) * 0.01 + np.eye(512)[rooms]
    tight = features.room_numbers(islands, rooms)
    assert tight["room_purity"] == 1 and tight["spread_in_rooms"] < 0.4
    assert tight["room_purity_by_chance"] == pytest.approx((40 * 39 + 30 * 29 + 20 * 19) / (90 * 89))
    assert features.room_numbers(1000 * islands, rooms)["spread_in_rooms"] == pytest.approx(tight["spread_in_rooms"])

    cloud = rng.normal(size=(90, 512))
    loose = features.room_numbers(cloud, rooms)
    assert loose["spread_in_rooms"] == pytest.approx(1, abs=0.01)
    knn = KNeighborsClassifier(features.NEIGHBOURS).fit(cloud, rooms)
    assert loose["room_purity"] == pytest.approx((rooms[knn.kneighbors()[1]] == rooms[:, None]).mean())


def test_bad_input_ends_with_one_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    (breakout := tmp_path / "breakout").mkdir()
    checkpoint = torch.load(runs["snd"] / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["env_id"] = "Breakout-v5"
    torch.save(checkpoint, breakout / "checkpoint.pt")
    assert "give the folders of runs" in error_of(capsys)
    assert "different games" in error_of(capsys, runs["rnd"], breakout)
    assert "rooms of Breakout are unknown" in error_of(capsys, breakout)
    assert "--states 5" in error_of(capsys, breakout, "--states", 5)
    for share in (-1, 1.5):
        assert f"--random-actions {share}" in error_of(capsys, breakout, "--random-actions", share)
    assert "is a folder" in error_of(capsys, breakout, "--output", tmp_path)
    few = ["--states", 12, "--every", 1, "--games", 1, "--output", tmp_path / "out"]
    assert "only room 0" in error_of(capsys, runs["snd"], *few)
    assert [*tmp_path.iterdir()] == [breakout]
