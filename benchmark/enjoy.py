"""Play a checkpoint: scores, rooms and a film of it.

    python benchmark/enjoy.py runs/NAME
    python benchmark/enjoy.py runs/NAME --episodes 20 --greedy --output films/venture
    python benchmark/enjoy.py runs/NAME --script ~/mine/my_snd.py

An episode is a whole game, under the protocol the run was trained with, on EnvPool whatever the run's backend was. No
screen is needed. The film shows the first games one after the other, the GIF the start of the best of them.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
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
import tyro
from cli import check_least, fail, make_folder_of, one_line
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]  # where the training scripts are
FRAME_RATE = 15  # pictures a second: the console's 60, of which an agent sees every fourth
STRIP = 30  # pixels below the game's picture, for the numbers
FILM_SCALE, GIF_SCALE = 3, 2  # the film is 480 x 720 pixels, the GIF 320 x 480
GIF_SECONDS = 30  # longer ones get too large to show


@dataclass
class Options:
    run: tyro.conf.Positional[Path]
    """folder of a run, with its checkpoint.pt"""
    episodes: int = 5
    """games to play"""
    film_episodes: int = 5
    """how many of them to film; 0: no film"""
    greedy: bool = False
    """take the likeliest action instead of drawing one from the policy"""
    seed: int = 1
    """seed of the games and of the actions"""
    max_steps: int | None = None
    """end a game after this many agent steps; unset: at its end"""
    output: Path | None = None
    """film, without ending; unset: RUN/enjoy"""
    script: Path | None = None
    """the training script, where it is not the project's own"""


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
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
    except OSError:
        fail(f"{run_dir}: give the folder of a run, with its checkpoint.pt")
    except Exception as error:  # whatever a broken or foreign file makes the reader raise
        fail(f"{path} is not a readable checkpoint: {one_line(error)}")
    script = next((script for script in scripts if script.stem == name), ROOT / f"{name}.py")
    for module_name in ("models", name):  # a copied script has a models.py of its own
        sys.modules.pop(module_name, None)
    try:
        with patch.object(sys, "path", [str(script.resolve().parent), *sys.path]):
            module = importlib.import_module(name)
        checkpoint = module.load_checkpoint(run_dir)
    except (ImportError, AttributeError, SyntaxError) as error:
        fail(f"{path} was written by {name}.py; {script} is no such training script: {error}; give one with --script")
    return module, replace(checkpoint["args"], compile=False), checkpoint


def load_runs(run_dirs: Iterable[Path], scripts: Sequence[Path]) -> dict[Path, tuple[ModuleType, Any, dict]]:
    """{folder: what load_run returns}; exit status 2 also for one of `scripts` that is not there or not needed."""
    runs = {run_dir: load_run(run_dir, scripts) for run_dir in dict.fromkeys(run_dirs)}
    for script in scripts:
        if script.resolve() not in {Path(module.__file__) for module, _, _ in runs.values()}:
            fail(f"--script {script}: there is no such file, or no checkpoint was written by a script of that name")
    return runs


def make_envs(module: ModuleType, args: Any, seed: int) -> Any:
    """`args.num_envs` games as the script itself makes them, but on EnvPool, with colour screens to be read.

    The script asks EnvPool for its games, so the one option that it does not know is added to what it asks for.
    """
    try:
        import envpool
    except ImportError:
        fail("games are played on EnvPool, whatever the run's own backend: pip install envpool")
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
    max_steps: int | None = None,
    film: Callable[[np.ndarray], None] | None = None,
    bar: tqdm | None = None,
) -> Episode:
    """Play one game to its end (or for `max_steps`); hands each picture to `film` and counts the steps on `bar`."""
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
        if bar is not None:
            bar.set_postfix(score=f"{envs.scores[0]:,.0f}", refresh=False)
            bar.update()


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


def play_all(module: ModuleType, args: Any, learner: Any, options: Options, output: Path) -> list[Episode]:
    """Play all games and film the first ones as `output` with .mp4 and .gif. Raises OSError."""
    episodes, best_score, best_film = [], -np.inf, []
    film = contextlib.nullcontext()
    if options.film_episodes:
        scale = ["-vf", f"scale=iw*{FILM_SCALE}:ih*{FILM_SCALE}:flags=neighbor"]
        how = dict(fps=FRAME_RATE, codec="libx264", quality=8, ffmpeg_log_level="error", output_params=scale)
        film = imageio.get_writer(f"{output}.mp4", **how)
    with film, tqdm(unit=" steps", disable=None) as bar:  # None: only in a terminal
        for i in range(options.episodes):
            pictures = []

            def add(image: np.ndarray, pictures: list[np.ndarray] = pictures) -> None:
                film.append_data(image)
                if len(pictures) < GIF_SECONDS * FRAME_RATE:
                    pictures.append(image)

            bar.reset()
            bar.set_description_str(f"game {i + 1} of {options.episodes}")
            rules = (options.seed + i, options.greedy, options.max_steps)
            episode = play(module, args, learner, *rules, add if i < options.film_episodes else None, bar)
            episodes.append(episode)
            if pictures and episode.score > best_score:
                best_score, best_film = episode.score, pictures
    if best_film:
        images = [image.repeat(GIF_SCALE, axis=0).repeat(GIF_SCALE, axis=1) for image in best_film[::2]]
        imageio.mimwrite(f"{output}.gif", images, duration=2000 / FRAME_RATE, loop=0)
    return episodes


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__.splitlines()[0], args=argv)
    check_least(options, episodes=1, film_episodes=0, max_steps=1)
    output = options.output or options.run / "enjoy"
    (run,) = load_runs([options.run], [options.script] if options.script else []).values()
    module, args, checkpoint = run
    if options.film_episodes:
        make_folder_of(output)
    envs = make_envs(module, replace(args, num_envs=1), options.seed)  # tells how many actions the game has
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    learner = load_learner(module, args, checkpoint, envs.num_actions, device)
    torch.manual_seed(options.seed)
    step = checkpoint["counters"]["global_step"]
    print(f"{envs.game}, {checkpoint['script']}, step {step:,}, {'greedy' if options.greedy else 'sampled'} actions")
    try:
        episodes = play_all(module, args, learner, options, output)
    except OSError as error:
        fail(f"cannot write to {output.parent}: {error.strerror or one_line(error)}")
    print(summary(episodes))
    if filmed := episodes[: options.film_episodes]:
        seconds, best = sum(e.length + 1 for e in filmed) / FRAME_RATE, 1 + np.argmax([e.score for e in filmed])
        print(f"{output}.mp4: {seconds:.0f} s, games 1 to {len(filmed)}; {output}.gif: game {best}")


if __name__ == "__main__":
    main()
