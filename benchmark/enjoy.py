"""Play a checkpoint: scores, rooms and a film of it.

    python benchmark/enjoy.py runs/NAME
    python benchmark/enjoy.py runs/NAME --episodes 20 --greedy --output films/venture
    python benchmark/enjoy.py runs/NAME --script ~/mine/my_snd.py

An episode is a whole game, under the protocol the run was trained with, on EnvPool whatever the run's backend was. No
screen is needed.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import cv2
import imageio.v2 as imageio
import numpy as np
import torch
from cli import check_output, fail
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]  # where the training scripts are
FRAME_RATE = 15  # pictures a second: the console's 60, of which an agent sees every fourth
STRIP = 30  # pixels below the game's picture, for the numbers
GIF_SECONDS = 30  # longer ones get too large to show


@dataclass
class Episode:
    """What came of one game: its true score, its agent steps, the rooms seen, the intrinsic reward of each step."""

    score: float
    length: int
    rooms: set[int]
    int_rewards: list[float]


def load_run(run_dir: Path, scripts: Sequence[Path] = ()) -> tuple[ModuleType, Any, dict]:
    """The module of a run's script, its arguments and its checkpoint; exit status 2 if one of them is missing.

    The checkpoint names the script, which is one of `scripts` or lies in the project's folder.
    """
    path = run_dir / "checkpoint.pt"
    if not os.path.isfile(path):
        fail(f"{run_dir}: give the folder of a run, with its checkpoint.pt")
    given = {script.stem: script for script in scripts}
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
        known = name in given or (bool(re.fullmatch(r"\w+", name)) and (ROOT / f"{name}.py").is_file())
    except Exception as error:  # whatever a broken or foreign file makes the reader raise
        fail(f"{path} is not a readable checkpoint: {(str(error).splitlines() or [type(error).__name__])[0]}")
    if not known:
        fail(f"{path} was written by {name}.py, which is not in {ROOT}; give its path with --script")
    script = given.get(name, ROOT / f"{name}.py")
    folder = str(script.resolve().parent)
    for name in ("models", script.stem):  # a copied script has a models.py of its own
        sys.modules.pop(name, None)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(script.stem)
        checkpoint = module.load_checkpoint(run_dir)
    except (ImportError, AttributeError, SyntaxError) as error:
        fail(f"{script} is not a training script of this project: {error}")
    finally:
        sys.path.remove(folder)
    return module, replace(checkpoint["args"], compile=False), checkpoint


def load_runs(run_dirs: Iterable[Path], scripts: Sequence[Path]) -> dict[Path, tuple[ModuleType, Any, dict]]:
    """{folder: what load_run returns}; exit status 2 also for one of `scripts` that is not there or not needed."""
    for script in scripts:
        if not script.is_file():
            fail(f"--script {script}: there is no such file")
    runs = {run_dir: load_run(run_dir, scripts) for run_dir in dict.fromkeys(run_dirs)}
    for script in scripts:
        if script.stem not in {checkpoint["script"] for _, _, checkpoint in runs.values()}:
            fail(f"--script {script}: no checkpoint was written by a script of that name")
    return runs


def make_envs(module: ModuleType, args: Any, seed: int) -> Any:
    """`args.num_envs` games as the script itself makes them, but on EnvPool, with colour screens to be read.

    The script asks EnvPool for its games, so the one option that it does not know is added to what it asks for.
    """
    if not importlib.util.find_spec("envpool"):
        fail("games are played on EnvPool, whatever the run's own backend: pip install envpool")
    import envpool

    module.check_args(args := replace(args, seed=seed, env_backend="envpool", track=False))
    with patch.object(envpool, "make", partial(envpool.make, render_mode="rgb_array")):
        return module.AtariEnvs(args, seed)


def load_learner(module: ModuleType, args: Any, checkpoint: dict, num_actions: int, device: torch.device) -> Any:
    """The script's Learner with the checkpoint's weights and statistics."""
    learner = module.Learner(args, num_actions, device)
    module.restore(learner, checkpoint)
    return learner


def choose_actions(module: ModuleType, learner: Any, args: Any, obs: torch.Tensor, greedy: bool) -> np.ndarray:
    """Actions (batch,) int64 for obs (batch, 4, 96, 96) uint8: the likeliest, or drawn from the policy."""
    with torch.no_grad(), module.autocast(args, obs.device):
        logits, _ = learner.agent(obs)
    actions = logits.argmax(dim=1) if greedy else torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
    return actions.cpu().numpy()


@torch.no_grad()
def intrinsic_rewards(module: ModuleType, learner: Any, args: Any, obs: torch.Tensor) -> np.ndarray:
    """The novelty (batch,) of obs (batch, 4, 96, 96) uint8 as the run pays it; nan if a copied script has another."""
    if not (hasattr(learner, "target") and hasattr(learner, "predictor")):
        return np.full(len(obs), np.nan)
    x = module.novelty_input(obs, learner.obs_stats, args.norm_obs)
    rewards = module.novelty(learner.target(x), learner.predictor(x), args.int_reward_scale)
    if args.norm_int_reward:
        rewards = rewards / learner.int_return_stats.var.sqrt().float().clamp(min=1e-8)
    return rewards.cpu().numpy()


def picture(screen: np.ndarray, score: float, room: int | None, int_reward: float) -> np.ndarray:
    """The game's screen (210, 160, 3) uint8 with a strip of numbers below it: (240, 160, 3)."""
    image = np.zeros((screen.shape[0] + STRIP, *screen.shape[1:]), np.uint8)
    image[: screen.shape[0]] = screen
    lines = [f"score {score:,.0f}" + (f"  room {room}" if room is not None else ""), f"intrinsic {int_reward:.4f}"]
    for row, text in enumerate(lines):
        place = (4, screen.shape[0] + 12 + 14 * row)
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_PLAIN, 0.8, (255, 255, 255), 1, cv2.LINE_AA)
    return image


def play(
    module: ModuleType,
    args: Any,
    learner: Any,
    seed: int,
    greedy: bool,
    max_steps: int | None,
    film: Callable[[np.ndarray], None] | None,
) -> Episode:
    """Play one game to its end (or for `max_steps`); hands each picture to `film` unless that is None."""
    envs = make_envs(module, replace(args, num_envs=1), seed)
    device = next(learner.agent.parameters()).device
    rooms, room, int_rewards, was_reset = set(), None, [], False
    while True:
        obs = torch.from_numpy(envs.next_obs[0]).to(device)
        if envs.rooms:  # emptied before each step, it holds the room of this one
            (room,) = envs.rooms
            rooms.add(room)
            envs.rooms.clear()
        score, length = envs.finished[0] if envs.finished else (envs.scores[0], int(envs.lengths[0]))
        if not was_reset:  # under --episodic-life a lost life is followed by a reset row, and the game goes on
            if length:
                int_rewards.append(float(intrinsic_rewards(module, learner, args, obs)[0]))
            if film is not None:
                film(picture(envs.envs[0].render()[0], score, room, int_rewards[-1] if int_rewards else 0.0))
        if envs.finished or length == max_steps:
            return Episode(float(score), length, rooms, int_rewards)
        was_reset = envs.resets[0].copy()
        envs.send(0, choose_actions(module, learner, args, obs, greedy).astype(np.int32))
        envs.recv(0)


@contextlib.contextmanager
def film_to(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that takes one picture after the other; PATH.mp4 and PATH.gif are there when all is done.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mp4, gif = (path.with_name(f".{path.name}.part{ending}") for ending in (".mp4", ".gif"))
    mp4_options = dict(fps=FRAME_RATE, codec="libx264", quality=8, ffmpeg_log_level="error")
    numbers = itertools.count()
    try:
        with (
            imageio.get_writer(mp4, **mp4_options) as mp4_writer,
            imageio.get_writer(gif, duration=2000 / FRAME_RATE, loop=0) as gif_writer,
        ):

            def add(image: np.ndarray) -> None:
                mp4_writer.append_data(image)
                if (number := next(numbers)) < GIF_SECONDS * FRAME_RATE and number % 2 == 0:
                    gif_writer.append_data(image)

            yield add
        mp4.replace(f"{path}.mp4")
        gif.replace(f"{path}.gif")
    finally:
        mp4.unlink(missing_ok=True)
        gif.unlink(missing_ok=True)


def summary(episodes: list[Episode]) -> str:
    """Mean and spread of the games, and their rooms."""
    scores, lengths = np.array([e.score for e in episodes]), np.array([e.length for e in episodes])
    rooms = set().union(*(e.rooms for e in episodes))
    lines = [
        f"score {scores.mean():,.1f} ± {scores.std():,.1f} (standard deviation over {len(scores)} "
        f"episode{'s' * (len(scores) > 1)}; from {scores.min():,.0f} to {scores.max():,.0f})",
        f"length {lengths.mean():,.1f} ± {lengths.std():,.1f} agent steps",
        f"intrinsic reward {np.mean([r for e in episodes for r in e.int_rewards]):.4f} a step",
    ]
    if rooms:
        each = np.mean([len(e.rooms) for e in episodes])
        lines.append(f"rooms {each:.1f} an episode, {len(rooms)} in all: {', '.join(map(str, sorted(rooms)))}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exit status 2 if a number makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, with its checkpoint.pt")
    parser.add_argument("--episodes", type=int, default=5, help="games to play (default: 5)")
    parser.add_argument(
        "--film-episodes", type=int, default=1, help="how many of them to film (default: 1; 0: no film)"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="take the likeliest action (default: draw from the policy)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the games and of the actions (default: 1)")
    parser.add_argument("--max-steps", type=int, help="end a game after this many agent steps (default: at its end)")
    parser.add_argument("--output", type=Path, help="film, without ending (default: RUN/enjoy)")
    parser.add_argument("--script", type=Path, help="the training script, where it is not the project's own")
    options = parser.parse_args(argv)
    for name, least in dict(episodes=1, film_episodes=0, max_steps=1).items():
        value = getattr(options, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    output = options.output or options.run / "enjoy"
    if options.film_episodes:
        check_output(output)
    (run,) = load_runs([options.run], [options.script] if options.script else []).values()
    module, args, checkpoint = run
    envs = make_envs(module, replace(args, num_envs=1), options.seed)  # tells how many actions the game has
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    learner = load_learner(module, args, checkpoint, envs.num_actions, device)
    torch.manual_seed(options.seed)

    step = checkpoint["counters"]["global_step"]
    print(f"{envs.game}, {checkpoint['script']}, step {step:,}, {'greedy' if options.greedy else 'sampled'} actions")
    episodes = []
    try:
        with (
            film_to(output) if options.film_episodes else contextlib.nullcontext() as film,
            tqdm(total=options.episodes, unit="episode", disable=None) as bar,  # None: only in a terminal
        ):
            for i in range(options.episodes):
                filmed = film if i < options.film_episodes else None
                rules = (options.seed + i, options.greedy, options.max_steps)
                episodes.append(play(module, args, learner, *rules, filmed))
                bar.set_postfix(score=f"{episodes[-1].score:,.0f}", steps=episodes[-1].length)
                bar.update()
    except OSError as error:
        if episodes:
            print(summary(episodes))
        fail(f"cannot write to {output.parent}: {error.strerror or str(error).splitlines()[0]}")
    print(summary(episodes))
    if options.film_episodes:
        seconds = sum(episode.length + 1 for episode in episodes[: options.film_episodes]) / FRAME_RATE
        print(f"{output}.mp4, {output}.gif: {seconds:.0f} s of play")


if __name__ == "__main__":
    main()
