"""benchmark/enjoy.py on real checkpoints and the real emulator."""

import os
import pty
import re
import shutil
import sys
import termios
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import enjoy
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, SND
from PIL import Image, ImageSequence
from running import error_of, finish, read_terminal, start, trained_run

error_of = partial(error_of, enjoy.main)
pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(scope="session")
def breakout() -> Path:
    """A run without rooms whose games end soon."""
    return trained_run(SND, "Breakout", 5)


@pytest.fixture(scope="session")
def private_eye() -> Path:
    """A run in a game of many rooms."""
    return trained_run("ppo_rnd_atari", "PrivateEye", 2)


def test_whole_games_are_played_and_the_same_again(breakout: Path, capsys: pytest.CaptureFixture):
    arguments = [str(breakout), "--episodes", "1", "--output", "film", "--seed", "3"]
    enjoy.main(arguments)
    first = capsys.readouterr().out
    enjoy.main(arguments)
    assert capsys.readouterr().out == first
    assert "Breakout, ppo_snd_atari, step 1,280, sampled" in first and "rooms" not in first
    length = float(re.search(r"length ([\d,.]+)", first)[1].replace(",", ""))
    assert length > 50  # five lives of Breakout
    film = [*imageio.get_reader("film.mp4").iter_data()]
    assert film[0].shape == (720, 480, 3) and 50 < len(film) <= length + 1
    gif = Image.open("film.gif")
    assert gif.size == (320, 480)
    console = np.array(gif.convert("RGB"))[::2, ::2]
    assert np.array_equal(gif.convert("RGB"), console.repeat(2, axis=0).repeat(2, axis=1))  # its pixels are squares
    small = film[0][1::3, 1::3].astype(int)
    assert np.abs(small - console).mean() < 5  # and the film starts with the same picture, compressed
    milliseconds = sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif))  # like frames are merged
    assert milliseconds == pytest.approx(1000 * min(len(film), 450) / 15, rel=0.1)
    assert sorted(os.listdir()) == ["film.gif", "film.mp4"]


@pytest.mark.parametrize("episodic_life", [False, True])
def test_a_game_has_the_runs_protocol_and_is_filmed_in_colour(breakout: Path, episodic_life: bool):
    """The same game played once more without a film; losing a life does not end it, --episodic-life or not."""
    agent = enjoy.load_agent(breakout)
    rules = dict(env_backend="gymnasium", episodic_life=episodic_life, repeat_action_probability=0.5)
    agent.args = replace(agent.args, **rules)
    actions, film, choose = [], [], enjoy.Agent.choose_actions
    with mock.patch.object(enjoy.Agent, "choose_actions", lambda *given: actions.append(choose(*given)) or actions[-1]):
        episode = enjoy.play(agent, 5, False, None, film.append)
    envs = agent.module.AtariEnvs(replace(agent.args, env_backend="envpool", num_envs=1), 5)
    lives, frames = set(envs.infos[0]["lives"]), [envs.next_obs[0][0, -1]]
    for action in actions:
        was_reset = envs.resets[0].copy()
        envs.send(0, action)
        envs.recv(0)
        lives |= set(envs.infos[0]["lives"])
        frames += [envs.next_obs[0][0, -1]] * (not was_reset)
    assert envs.finished == [(episode.score, episode.length)] and lives == {0, 1, 2, 3, 4, 5}
    assert len(frames) == len(film) == episode.length + 1 == len(episode.int_rewards) + 1
    grey = [cv2.cvtColor(image[:210], cv2.COLOR_RGB2GRAY) for image in film]
    grey = np.stack([cv2.resize(screen, (96, 96), interpolation=cv2.INTER_AREA) for screen in grey]).astype(int)
    # An observation is the maximum of two screens, of which a film shows the second.
    assert (grey <= np.stack(frames) + 1).all() and np.abs(grey - frames).mean() < 0.1
    assert np.ptp(film[-1][:210].astype(int), axis=-1).max() > 50  # it is not grey itself
    assert film[-1][210:].max() > 200 and not film[-1][238:].any()  # text, inside its strip
    assert not np.array_equal(film[1][210:], film[-1][210:])


def test_the_intrinsic_reward_is_the_scripts_own(private_eye: Path):
    agent = enjoy.load_agent(private_eye)
    obs, learner = agent.make_envs(1, 4).next_obs[0], agent.learner
    frames = torch.from_numpy(obs[:, -1:] / np.float32(256)) - learner.obs_stats.mean.float()
    with torch.no_grad():
        expected = 1e-4 * ((learner.target(frames) - learner.predictor(frames)) ** 2).sum(dim=1).numpy()
    agent.args.int_reward_scale = 1e-4  # below the clip
    assert agent.intrinsic_rewards(obs) == pytest.approx(expected, rel=1e-4) and expected.max() < 1
    learner.int_return_stats = agent.module.RunningMeanStd()
    learner.int_return_stats.var.fill_(16)
    agent.args.norm_int_reward = True
    assert agent.intrinsic_rewards(obs) == pytest.approx(expected / 4, rel=1e-4)
    del learner.predictor  # as in a copied script with another kind of novelty
    assert np.isnan(agent.intrinsic_rewards(obs)).all()


@pytest.mark.parametrize("flags", [[], ["--greedy"]])
def test_rooms_are_counted_and_greedy_takes_the_likeliest_action(
    private_eye: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    likeliest, choose = [], enjoy.Agent.choose_actions

    def chosen(agent: enjoy.Agent, obs: np.ndarray, greedy: bool) -> np.ndarray:
        actions = choose(agent, obs, greedy)
        with torch.no_grad(), agent.module.autocast(agent.args, torch.device("cpu")):
            likeliest.append(actions.item() == agent.learner.agent(agent.tensor(obs))[0].argmax().item())
        return actions

    monkeypatch.setattr(enjoy.Agent, "choose_actions", chosen)
    arguments = ["--episodes", "1", "--max-steps", "150", "--film-episodes", "0", "--output", "film"]
    enjoy.main([str(private_eye), *flags, *arguments])
    assert len(likeliest) == 150 and sum(likeliest) > 0 and all(likeliest) == bool(flags)
    rooms = re.search(r"rooms [\d.]+ an episode, (\d+) in all: (.*)", capsys.readouterr().out)
    assert int(rooms[1]) == len(rooms[2].split(", ")) and "0" in rooms[2].split(", ")  # it begins in room 0
    assert not os.listdir()  # no film was asked for


def test_the_summary_has_means_and_spreads():
    episodes = [enjoy.Episode(10.0, 100, {1, 2}, [0.5, 0.1]), enjoy.Episode(30.0, 300, {2}, [0.3])]
    assert enjoy.summary(episodes).splitlines() == [
        "score 20.0 ± 10.0 (standard deviation over 2 episodes; from 10 to 30)",
        "length 200.0 ± 100.0 agent steps",
        "intrinsic reward 0.3000 a step",
        "rooms 1.5 an episode, 2 in all: 1, 2",
    ]


def test_a_copied_script_plays_with_script(breakout: Path, capsys: pytest.CaptureFixture):
    shutil.copy(ROOT / "models.py", ".")
    copy = Path(shutil.copy(ROOT / f"{SND}.py", "my_snd.py"))
    (run := Path("run")).mkdir()
    torch.save(torch.load(breakout / "checkpoint.pt") | {"script": "my_snd"}, run / "checkpoint.pt")
    arguments = [run, "--episodes", "1", "--max-steps", "5", "--film-episodes", "0"]
    assert "written by my_snd.py" in error_of(capsys, *arguments)
    enjoy.main([*map(str, arguments), "--script", str(copy)])
    assert "Breakout, my_snd, step 1,280" in capsys.readouterr().out
    files = [Path(agent.module.__file__) for agent in enjoy.load_agents([breakout, run], [copy]).values()]
    assert files == [ROOT / f"{SND}.py", copy.resolve()]
    assert "no checkpoint was written by" in error_of(capsys, breakout, "--script", copy)


def test_the_gif_shows_the_first_of_the_best_filmed_games(
    breakout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Games of one colour and known scores; the fourth, which is better, is not filmed."""
    scores, steps = iter((3, 7, 7, 9)), []

    def play(*given: object) -> enjoy.Episode:
        *_, film, bar = given
        game = len(steps)
        steps.append(bar.desc)
        for _ in range(4 if film else 0):
            film(np.full((240, 160, 3), 50 * (game + 1), np.uint8))
        return enjoy.Episode(float(next(scores)), 3, set(), [0.0])

    monkeypatch.setattr(enjoy, "play", play)
    enjoy.main([str(breakout), "--episodes", "4", "--film-episodes", "3", "--output", "film"])
    film = [round(image.mean()) for image in imageio.get_reader("film.mp4").iter_data()]
    assert film == pytest.approx([50] * 4 + [100] * 4 + [150] * 4, abs=3)
    assert np.array(Image.open("film.gif").convert("RGB")).mean() == pytest.approx(100, abs=1)
    assert "film.mp4: 1 s, games 1 to 3;" in (out := capsys.readouterr().out) and "film.gif: game 2" in out


def test_progress_shows_the_steps_of_the_present_game(breakout: Path):
    """In a terminal, of which tqdm asks the size."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    arguments = [str(breakout), "--episodes", "2", "--max-steps", "9", "--output", "film"]
    process = start("benchmark/enjoy", arguments, Path.cwd(), stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    os.close(ours)
    assert finish(process)[0] == 0 and re.search(r"game 2 of 2: \d steps .*score=", shown)


def test_bad_input_ends_with_one_line(breakout: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    refused = partial(error_of, capsys)
    for name in ("none", "n" * 300):  # which no folder can have
        assert "give the folder of a run" in refused(name)
    assert "is a folder" in refused(breakout, "--output", ".")
    assert "--episodes 0" in refused(breakout, "--episodes", 0)
    assert "no such file" in refused(breakout, "--script", "none.py")
    assert not os.listdir()
    torch.save({"weights": torch.zeros(2)}, "checkpoint.pt")
    assert "not a readable checkpoint" in refused(".")
    Path("checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "not a readable checkpoint" in refused(".")
    Path(f"{SND}.py").write_text("x = 1\n")
    with mock.patch.dict(sys.modules):  # which the failed import would leave changed for other tests
        assert "no such training script" in refused(breakout, "--script", f"{SND}.py")
    Path("file").write_text("")
    film = ["--max-steps", 2, "--output", "file/film"]
    assert "cannot write to" in refused(breakout, *film)
    monkeypatch.setitem(sys.modules, "envpool", None)  # importing it now fails
    assert "pip install envpool" in refused(breakout)
