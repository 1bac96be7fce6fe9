"""benchmark/enjoy.py on real checkpoints and the real emulator."""

import importlib
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import enjoy
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageSequence
from running import error_of, trained_run

error_of = partial(error_of, enjoy.main)


@pytest.fixture(scope="session")
def breakout() -> Path:
    """A run without rooms whose games end soon."""
    return trained_run("ppo_snd_atari", "Breakout", 5)


@pytest.fixture(scope="session")
def private_eye() -> Path:
    """A run in a game of many rooms."""
    return trained_run("ppo_rnd_atari", "PrivateEye", 2)


def test_whole_games_are_played_and_the_same_again(breakout: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = [str(breakout), "--episodes", "1", "--output", str(tmp_path / "film"), "--seed", "3"]
    enjoy.main(arguments)
    first = capsys.readouterr().out
    enjoy.main(arguments)
    assert capsys.readouterr().out == first
    assert "over 1 episode;" in first and "rooms" not in first
    length = float(re.search(r"length ([\d,.]+)", first)[1].replace(",", ""))
    assert length > 50  # five lives of Breakout
    film = [*imageio.get_reader(tmp_path / "film.mp4").iter_data()]
    assert film[0].shape == (240, 160, 3)
    assert 50 < len(film) <= length + 1
    gif = Image.open(tmp_path / "film.gif")
    assert gif.size == (160, 240)
    milliseconds = sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif))  # like frames are merged
    assert milliseconds == pytest.approx(1000 * min(len(film), 450) / 15, rel=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif", "film.mp4"]


def test_the_film_shows_the_game_in_colour_with_its_numbers(breakout: Path):
    module, args, state = enjoy.load_run(breakout)
    game = module.AtariGame("breakout", 1, 0.25, False)
    learner = enjoy.load_learner(module, args, state, 4, breakout / "checkpoint.pt", torch.device("cpu"))
    film = []
    episode = enjoy.play(module, game, learner, args, "Breakout", False, 30, film.append)
    assert (episode.length, len(film), len(episode.int_rewards)) == (30, 31, 30)
    assert np.array_equal(film[-1][:210], game.ale.getScreenRGB())
    assert np.ptp(film[-1][:210].astype(int), axis=-1).max() > 50  # colours, not grey
    assert film[-1][210:].max() > 200 and not film[-1][238:].any()  # text, inside its strip
    assert not np.array_equal(film[1][210:], film[-1][210:])


def test_the_intrinsic_reward_is_the_scripts_own(private_eye: Path):
    module, args, state = enjoy.load_run(private_eye)
    game = module.AtariGame("private_eye", 1, 0.25, False)
    learner = enjoy.load_learner(module, args, state, 18, private_eye / "checkpoint.pt", torch.device("cpu"))
    obs = torch.from_numpy(game.reset()[0])[None]
    frame = obs[:, -1:].float() / 256 - learner.obs_stats.mean.float()
    with torch.no_grad():
        expected = 1e-4 * ((learner.target(frame) - learner.predictor(frame)) ** 2).sum().item()
    args = enjoy.replace(args, int_reward_scale=1e-4)  # below the clip
    assert enjoy.intrinsic_reward(module, learner, args, obs) == pytest.approx(expected, rel=1e-4) and expected < 1
    learner.int_returns.stats.var.fill_(16)
    scaled = enjoy.intrinsic_reward(module, learner, enjoy.replace(args, norm_int_reward=True), obs)
    assert scaled == pytest.approx(expected / 4, rel=1e-4)
    del learner.predictor  # as in a copied script with another kind of novelty
    assert np.isnan(enjoy.intrinsic_reward(module, learner, args, obs))


def test_greedy_takes_the_likeliest_action_and_sampling_does_not_always(private_eye: Path):
    module, args, state = enjoy.load_run(private_eye)
    learner = enjoy.load_learner(module, args, state, 18, private_eye / "checkpoint.pt", torch.device("cpu"))
    obs = torch.from_numpy(np.random.default_rng(0).integers(256, size=(1, 4, 96, 96), dtype=np.uint8)).expand(
        200, -1, -1, -1
    )
    greedy = enjoy.choose_actions(module, learner, args, obs, greedy=True)
    with torch.no_grad():
        assert (greedy == learner.agent(obs)[0][0].argmax().item()).all()
    assert len(np.unique(enjoy.choose_actions(module, learner, args, obs, greedy=False))) > 5


def test_rooms_are_counted(private_eye: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--episodes", "1", "--max-steps", "250", "--film-episodes", "0", "--output", str(tmp_path / "film")]
    enjoy.main([str(private_eye), *arguments])
    text = capsys.readouterr().out
    rooms = re.search(r"rooms [\d.]+ an episode, (\d+) in all: (.*)", text)
    assert int(rooms[1]) == len(rooms[2].split(", ")) and "0" in rooms[2].split(", ")  # it begins in room 0
    assert not list(tmp_path.iterdir())  # no film was asked for


def test_lost_lives_do_not_end_a_game_under_episodic_life(breakout: Path):
    module, args, state = enjoy.load_run(breakout)
    learner = enjoy.load_learner(module, args, state, 4, breakout / "checkpoint.pt", torch.device("cpu"))
    game = module.AtariGame("breakout", 1, 0.25, True)
    rewards, step = [], game.step
    game.step = lambda action: rewards.append((result := step(action))[4]["reward"]) or result
    episode = enjoy.play(module, game, learner, args, "Breakout", False, None, None)
    assert game.ale.game_over() and game.ale.lives() == 0
    assert (episode.score, episode.length) == (sum(rewards), len(rewards))


def test_a_game_has_the_runs_protocol(breakout: Path, monkeypatch: pytest.MonkeyPatch):
    module, args, state = enjoy.load_run(breakout)
    learner = enjoy.load_learner(module, args, state, 4, breakout / "checkpoint.pt", torch.device("cpu"))
    monkeypatch.setattr(module, "MAX_EPISODE_STEPS", 20)
    game = enjoy.make_game(module, enjoy.replace(args, repeat_action_probability=0.125, episodic_life=True), 1)
    assert game.ale.getFloat("repeat_action_probability") == 0.125 and game.episodic_life
    assert enjoy.play(module, game, learner, args, "Breakout", False, 100, None).length == 20


def test_the_summary_has_means_and_spreads():
    episodes = [enjoy.Episode(10.0, 100, {1, 2}, [0.5, 0.1]), enjoy.Episode(30.0, 300, {2}, [0.3])]
    assert enjoy.summary(episodes).splitlines() == [
        "score 20.0 ± 10.0 (standard deviation over 2 episodes; from 10 to 30)",
        "length 200.0 ± 100.0 agent steps",
        "intrinsic reward 0.3000 a step",
        "rooms 1.5 an episode, 2 in all: 1, 2",
    ]


@pytest.mark.parametrize("flags", [[], ["--greedy"]])
def test_greedy_reaches_the_policy(breakout: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch):
    seen, choose = [], enjoy.choose_actions
    monkeypatch.setattr(enjoy, "choose_actions", lambda *given: seen.append(given[-1]) or choose(*given))
    enjoy.main([str(breakout), *flags, "--episodes", "1", "--max-steps", "3", "--film-episodes", "0"])
    assert seen == [bool(flags)] * 3


def test_the_runs_own_backend_need_not_be_installed(
    breakout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert enjoy.load_run(breakout)[1].env_backend == "envpool"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "envpool" else find(name))
    enjoy.main([str(breakout), "--episodes", "1", "--film-episodes", "0"])
    assert "over 1 episode;" in capsys.readouterr().out


def test_a_copied_script_plays_with_script(breakout: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("models.py", "ppo_snd_atari.py"):
        shutil.copy(ROOT / name, tmp_path)
    copy = tmp_path / "my_snd.py"
    (tmp_path / "ppo_snd_atari.py").rename(copy)
    state = torch.load(breakout / "checkpoint.pt", weights_only=True) | {"script": "my_snd"}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/checkpoint.pt")
    arguments = [tmp_path / "run", "--episodes", "1", "--max-steps", "5", "--film-episodes", "0"]
    assert "written by my_snd.py" in error_of(capsys, *arguments)
    enjoy.main([*map(str, arguments), "--script", str(copy)])
    assert "Breakout, my_snd, step 1,280" in capsys.readouterr().out
    runs = enjoy.load_runs([breakout, tmp_path / "run"], [copy]).values()  # the project's own beside it
    assert [Path(module.__file__) for module, _, _ in runs] == [ROOT / "ppo_snd_atari.py", copy]
    assert "no checkpoint was written by" in error_of(capsys, breakout, "--script", copy)


def test_bad_input_ends_with_one_line(breakout: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "give the folder of a run" in error_of(capsys, tmp_path / "none")
    assert "give the folder of a run" in error_of(capsys, tmp_path / ("n" * 300))  # a name that no folder can have
    assert "is a folder" in error_of(capsys, breakout, "--output", tmp_path)
    assert not list(tmp_path.iterdir())
    assert "--episodes 0" in error_of(capsys, breakout, "--episodes", 0)
    assert "no such file" in error_of(capsys, breakout, "--script", tmp_path / "none.py")
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "not a readable checkpoint" in error_of(capsys, tmp_path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "checkpoint.pt")
    assert "not a readable checkpoint" in error_of(capsys, tmp_path)
    (tmp_path / "ppo_snd_atari.py").write_text("x = 1\n")
    with mock.patch.dict(sys.modules):  # which the failed import would leave changed for other tests
        assert "not a training script" in error_of(capsys, breakout, "--script", tmp_path / "ppo_snd_atari.py")
    (tmp_path / "file").write_text("")
    arguments = ["--episodes", 1, "--max-steps", 2, "--output", tmp_path / "file/film"]
    assert "cannot write to" in error_of(capsys, breakout, *arguments)
