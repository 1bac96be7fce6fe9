"""Play a checkpoint: scores, rooms and a film of it.

    python benchmark/enjoy.py runs/NAME
    python benchmark/enjoy.py runs/NAME --episodes 20 --greedy --output films/venture
    python benchmark/enjoy.py runs/NAME --script ~/mine/my_snd.py

An episode is a whole game, under the protocol the run was trained with. No screen is needed.
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


@dataclass
class Agent:
    """A checkpoint that can play: its script's module, its arguments and its learner, at an agent step."""

    module: ModuleType
    args: Any
    learner: Any
    step: int

    def tensor(self, obs: np.ndarray) -> torch.Tensor:
        """Observations on the learner's device."""
        return torch.from_numpy(obs).to(next(self.learner.parameters()).device)

    @torch.no_grad()
    def choose_actions(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Actions (batch,) int32 for obs (batch, 4, 96, 96) uint8: the likeliest, or drawn from the policy."""
        obs = self.tensor(obs)
        with self.module.autocast(self.args, obs.device):
            logits, _ = self.learner.agent(obs)
        actions = logits.argmax(dim=1) if greedy else torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
        return actions.to("cpu", torch.int32).numpy()

    @torch.no_grad()
    def intrinsic_rewards(self, obs: np.ndarray) -> np.ndarray:
        """The novelty (batch,) of obs (batch, 4, 96, 96) uint8, as the run pays it; nan if a copy has another."""
        learner, args = self.learner, self.args
        if not (hasattr(learner, "target") and hasattr(learner, "predictor")):
            return np.full(len(obs), np.nan)
        x = self.module.novelty_input(self.tensor(obs), learner.obs_stats, args.norm_obs)
        rewards = self.module.novelty(learner.target(x), learner.predictor(x), args.int_reward_scale)
        if args.norm_int_reward:
            rewards = rewards / learner.int_return_stats.var.sqrt().float().clamp(min=1e-8)
        return rewards.cpu().numpy()

    def make_envs(self, seed: int, num_envs: int = 1) -> Any:
        """Games as the script itself makes them, but on EnvPool, with colour screens to be read.

        The script asks EnvPool for its games, so the one option that it does not know is added to what it asks for.
        """
        try:
            import envpool
        except ImportError:
            fail("games are played on EnvPool, whatever the run's own backend: pip install envpool")
        args = replace(self.args, seed=seed, num_envs=num_envs, env_backend="envpool", track=False)
        self.module.check_args(args)
        with patch.object(envpool, "make", partial(envpool.make, render_mode="rgb_array")):
            return self.module.AtariEnvs(args, seed)


def load_agent(run_dir: Path, scripts: Sequence[Path] = ()) -> Agent:
    """The agent of a run's checkpoint; exit status 2 if something is missing.

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
    agent = Agent(module, replace(checkpoint["args"], compile=False), None, checkpoint["counters"]["global_step"])
    device = torch.device("cuda" if agent.args.cuda and torch.cuda.is_available() else "cpu")
    agent.learner = module.Learner(agent.args, agent.make_envs(seed=1).num_actions, device)
    module.restore(agent.learner, checkpoint)
    return agent


def load_agents(run_dirs: Iterable[Path], scripts: Sequence[Path]) -> dict[Path, Agent]:
    """{folder: its agent}; exit status 2 also for one of `scripts` that is not there or not needed."""
    agents = {run_dir: load_agent(run_dir, scripts) for run_dir in dict.fromkeys(run_dirs)}
    for script in scripts:
        if script.resolve() not in {Path(agent.module.__file__) for agent in agents.values()}:
            fail(f"--script {script}: there is no such file, or no checkpoint was written by a script of that name")
    return agents


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
    agent: Agent,
    seed: int,
    greedy: bool,
    max_steps: int | None = None,
    film: Callable[[np.ndarray], None] | None = None,
    bar: tqdm | None = None,
) -> Episode:
    """Play one game to its end (or for `max_steps`); hands each picture to `film` and counts the steps on `bar`."""
    envs = agent.make_envs(seed)
    rooms, room, int_rewards, was_reset = set(), None, [], False
    while True:
        if envs.rooms:  # emptied before each step, it holds the room of this one
            (room,) = envs.rooms
            rooms.add(room)
            envs.rooms.clear()
        score, length = envs.finished[0] if envs.finished else (envs.scores[0], int(envs.lengths[0]))
        if not was_reset:  # under --episodic-life a lost life is followed by a reset row, and the game goes on
            if length:
                int_rewards.append(float(agent.intrinsic_rewards(envs.next_obs[0])[0]))
            if film is not None:
                film(picture(envs.envs[0].render()[0], score, room, int_rewards[-1] if int_rewards else 0.0))
        if envs.finished or length == max_steps:
            return Episode(float(score), length, rooms, int_rewards)
        was_reset = envs.resets[0].copy()
        envs.send(0, agent.choose_actions(envs.next_obs[0], greedy))
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


def play_all(agent: Agent, options: Options, output: Path) -> list[Episode]:
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
            film_it = add if i < options.film_episodes else None
            episode = play(agent, options.seed + i, options.greedy, options.max_steps, film_it, bar)
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
    (agent,) = load_agents([options.run], [options.script] if options.script else []).values()
    if options.film_episodes:
        make_folder_of(output)
    torch.manual_seed(options.seed)
    game, actions = agent.module.game_of(agent.args), "greedy" if options.greedy else "sampled"
    print(f"{game}, {agent.module.SCRIPT}, step {agent.step:,}, {actions} actions")
    try:
        episodes = play_all(agent, options, output)
    except OSError as error:
        fail(f"cannot write to {output.parent}: {error.strerror or one_line(error)}")
    print(summary(episodes))
    if filmed := episodes[: options.film_episodes]:
        seconds, best = sum(e.length + 1 for e in filmed) / FRAME_RATE, 1 + np.argmax([e.score for e in filmed])
        print(f"{output}.mp4: {seconds:.0f} s, games 1 to {len(filmed)}; {output}.gif: game {best}")


if __name__ == "__main__":
    main()
