"""benchmark/features.py on real checkpoints, its numbers against hand-made features."""

from dataclasses import replace
from functools import partial
from pathlib import Path

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


def collect(agent: enjoy.Agent, num_envs: int, *how: object) -> tuple[np.ndarray, np.ndarray]:
    """States and rooms of new games."""
    return features.collect_states(agent, agent.make_envs(1, num_envs), *how, 1)


def test_two_runs_see_the_same_states(runs: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture):
    arguments = ["--states", "150", "--every", "12", "--games", "4", "--random-actions", "0.2"]
    features.main([str(runs["rnd"]), str(runs["snd"]), *arguments])
    text = (folder / "features.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("PrivateEye, 150 states in ")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ppo")]
    assert [row[0] for row in rows] == [f"ppo_{name}_atari, seed 1, 512 steps" for name in runs] * 2
    rnd, snd, rnd_paid, snd_paid = (list(map(float, row[1:])) for row in rows)
    assert rnd[1] == snd[1] < rnd[0] <= 1 and 0 < rnd[2] < 1 and rnd[2] != snd[2]
    assert len(rnd_paid) == len(snd_paid) and len(set(snd_paid)) > 1  # RND's are all at the clip
    assert image.imread("features.png").std() > 0.01 and (folder / "features.svg").stat().st_size > 1000


def test_states_carry_the_room_that_the_emulator_is_in(runs: dict[str, Path]):
    agent = enjoy.load_agent(runs["snd"])
    states, rooms = collect(agent, 1, 60, 1, 1.0)
    envs, rng = agent.module.AtariEnvs(replace(agent.args, num_envs=1), 1), np.random.default_rng(1)
    for seen, room in zip(states, rooms, strict=True):  # the same seed, the same random actions: the same game
        assert np.array_equal(seen, envs.next_obs[0][0]) and room == envs.infos[0]["ram"][0, 92]
        rng.random(1)
        envs.send(0, rng.integers(envs.num_actions, size=1).astype(np.int32))
        envs.recv(0)
    assert np.array_equal(collect(agent, 1, 15, 4, 1.0)[0], states[3::4])


def test_look_against_plain_arithmetic(runs: dict[str, Path]):
    agent = enjoy.load_agent(runs["rnd"])
    states, _ = collect(agent, 2, 20, 3, 1.0)
    seen, rewards = features.look(agent, states)
    x = torch.from_numpy(states[:, -1:] / np.float32(256)) - agent.learner.obs_stats.mean.float()
    np.testing.assert_allclose(seen, agent.learner.target(x).detach(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(rewards, agent.intrinsic_rewards(states))  # which test_enjoy.py checks


def test_numbers_of_known_features():
    rng, rooms = np.random.default_rng(0), np.repeat([0, 1, 2], [40, 30, 20])
    islands = rng.normal(size=(90, 512)) * 0.01 + np.eye(512)[rooms]
    tight = features.room_numbers(islands, rooms)
    assert tight["room purity"] == 1 and tight["spread in rooms"] < 0.4
    assert tight["by chance"] == pytest.approx((40 * 39 + 30 * 29 + 20 * 19) / (90 * 89))
    assert features.room_numbers(1000 * islands, rooms)["spread in rooms"] == pytest.approx(tight["spread in rooms"])

    cloud = rng.normal(size=(90, 512))
    loose = features.room_numbers(cloud, rooms)
    assert loose["spread in rooms"] == pytest.approx(1, abs=0.01)
    knn = KNeighborsClassifier(features.NEIGHBOURS).fit(cloud, rooms)
    assert loose["room purity"] == pytest.approx((rooms[knn.kneighbors()[1]] == rooms[:, None]).mean())


def test_bad_input_ends_with_one_line(runs: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture):
    (boxing := folder / "boxing").mkdir()
    checkpoint = torch.load(runs["snd"] / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["env_id"] = "Boxing-v5"  # with as many actions as Private Eye
    torch.save(checkpoint, boxing / "checkpoint.pt")
    assert "give the folders of runs" in error_of(capsys)
    assert "different games" in error_of(capsys, runs["rnd"], boxing)
    assert "rooms of Boxing are unknown" in error_of(capsys, boxing)
    assert "--states 5" in error_of(capsys, boxing, "--states", 5)
    for share in (-1, 1.5):
        assert f"--random-actions {share}" in error_of(capsys, boxing, "--random-actions", share)
    assert "is a folder" in error_of(capsys, boxing, "--output", folder)
    assert "only room 0" in error_of(capsys, runs["snd"], "--states", 12, "--every", 1, "--games", 1)
    assert [*folder.iterdir()] == [boxing]
