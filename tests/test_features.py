"""benchmark/features.py on real checkpoints, its numbers against hand-made features."""

import json
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


def test_two_runs_see_the_same_states(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--states", "150", "--every", "12", "--games", "4", "--random-actions", "0.2"]
    features.main([str(runs["rnd"]), str(runs["snd"]), *arguments, "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["game"], record["states"]) == ("PrivateEye", 150)
    assert record["policy"] == str(runs["snd"])  # the last run
    assert [label.split(",")[0] for label in record["runs"]] == ["ppo_rnd_atari", "ppo_snd_atari"]
    rnd, snd = record["runs"].values()
    assert rnd["room_purity_by_chance"] == snd["room_purity_by_chance"] < rnd["room_purity"] <= 1
    assert 0 < rnd["spread_in_rooms"] < 1 and rnd["spread_in_rooms"] != snd["spread_in_rooms"]
    assert image.imread(tmp_path / "out.png").std() > 0.01
    assert (tmp_path / "out.svg").stat().st_size > 1000
    assert "| ppo_snd_atari, seed 1, 512 steps |" in (tmp_path / "out.md").read_text()
    rooms = [set(run["intrinsic_reward"]) for run in (rnd, snd)]
    assert rooms[0] == rooms[1] and len(rooms[0]) > 1
    assert len(set(snd["intrinsic_reward"].values())) > 1  # RND's are all at the clip
    assert all(0 < reward <= 1 for run in (rnd, snd) for reward in run["intrinsic_reward"].values())
    assert "spread in rooms" in capsys.readouterr().out


def test_states_carry_the_room_that_the_emulator_is_in(runs: dict[str, Path]):
    module, args, state = enjoy.load_run(runs["snd"])
    learner = enjoy.load_learner(module, args, state, 18, runs["snd"] / "checkpoint.pt", torch.device("cpu"))
    states, rooms = features.collect_states(module, learner, features.replace(args, num_envs=1), 60, 1, 1.0, seed=1)
    envs, rng = module.AtariEnvs(features.replace(args, num_envs=1), 1), np.random.default_rng(1)
    for seen, room in zip(states, rooms, strict=True):  # the same seed, the same random actions: the same game
        assert np.array_equal(seen, envs.next_obs[0]) and room == envs.ram[0, 92]
        rng.random(1)
        envs.step(rng.integers(envs.num_actions, size=1).astype(np.int32))
    envs.close()
    fewer, _ = features.collect_states(module, learner, features.replace(args, num_envs=1), 15, 4, 1.0, seed=1)
    assert np.array_equal(fewer, states[3::4])


def test_random_actions_come_in_their_share(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    module, args, state = enjoy.load_run(runs["snd"])
    learner = enjoy.load_learner(module, args, state, 18, runs["snd"] / "checkpoint.pt", torch.device("cpu"))
    with torch.no_grad():
        learner.agent.actor[-1].bias[5] += 100  # the policy's only action
    played, step = [], module.AtariEnvs.step
    monkeypatch.setattr(module.AtariEnvs, "step", lambda envs, actions: played.append(actions) or step(envs, actions))
    features.collect_states(module, learner, features.replace(args, num_envs=4), 400, 1, 0.25, seed=1)
    assert (np.stack(played) != 5).mean() == pytest.approx(0.25 * 17 / 18, abs=0.08)


def test_look_against_plain_arithmetic(runs: dict[str, Path]):
    """Features and rewards of real frames, RND's normalisation and reward written out."""
    module, args, state = enjoy.load_run(runs["rnd"])
    learner = enjoy.load_learner(module, args, state, 18, runs["rnd"] / "checkpoint.pt", torch.device("cpu"))
    states, _ = features.collect_states(module, learner, features.replace(args, num_envs=2), 20, 3, 1.0, seed=1)
    args = features.replace(args, int_reward_scale=1e-4)  # below the clip
    seen, rewards = features.look(module, learner, args, states)
    x = torch.from_numpy(states[:, -1:] / np.float32(256)) - learner.obs_stats.mean.float()
    with torch.no_grad():
        target, predictor = learner.target(x).double().numpy(), learner.predictor(x).double().numpy()
    np.testing.assert_allclose(seen, target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rewards, 1e-4 * ((target - predictor) ** 2).sum(axis=1), rtol=1e-4)

    learner.int_returns.stats.var.fill_(0.25)
    _, divided = features.look(module, learner, features.replace(args, norm_int_reward=True), states)
    np.testing.assert_allclose(divided, 2 * rewards, rtol=1e-6)


def test_numbers_of_known_features():
    rng = np.random.default_rng(0)
    rooms = np.repeat([0, 1, 2], [40, 30, 20])
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
    breakout = trained_run("ppo_snd_atari", "Breakout", 5)
    assert "give the folder of a run" in error_of(capsys, runs["rnd"], tmp_path)
    assert "different games" in error_of(capsys, runs["rnd"], breakout)
    assert "rooms of Breakout are unknown" in error_of(capsys, breakout)
    assert "--states 5" in error_of(capsys, breakout, "--states", 5)
    assert "--random-actions 2.0" in error_of(capsys, breakout, "--random-actions", 2)
    few = ["--states", 12, "--every", 1, "--games", 1, "--output", tmp_path / "out"]
    assert "only room 0" in error_of(capsys, runs["snd"], *few)
    assert not list(tmp_path.iterdir())
