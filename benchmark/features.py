"""Do the target's features spread inside rooms? Two or more checkpoints look at the same states.

    python benchmark/features.py runs/RND_RUN runs/SND_RUN
    python benchmark/features.py runs/RND_RUN runs/SND_RUN --states 4000 --random-actions 0.5 --output figures/features

States are collected with one run's policy; each run's target embeds them in 512 dimensions. The figure shows them in
two (t-SNE), coloured by room; the numbers beside it are taken in all 512:

- room purity: the share of a state's 10 nearest neighbours that are in its own room (chance: of any other state);
- spread in rooms: the mean distance of two states of one room, divided by the mean distance of any two states. It is
  free of the features' scale; small means tight islands, 1 that two states of a room are as far apart as any.

Beside them stands each run's mean intrinsic reward in each room: rooms that the run has not seen should pay more.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from cli import check_least, fail, make_folder_of, markdown_table
from enjoy import choose_actions, intrinsic_rewards, load_learner, load_runs, make_envs
from matplotlib import pyplot as plt
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from tqdm import tqdm

NEIGHBOURS = 10
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito, no yellow
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of one game, each a panel of the figure"""
    policy: Path | None = None
    """the run whose policy collects the states; unset: the last one"""
    states: int = 2000
    """states to embed"""
    every: int = 10
    """agent steps between two kept states"""
    games: int = 8
    """games played side by side"""
    random_actions: float = 0.0
    """share of actions drawn at random, from 0 to 1"""
    seed: int = 1
    """seed of the games, the actions and t-SNE"""
    output: Path = Path("features")
    """results, without ending"""
    script: tuple[Path, ...] = ()
    """training scripts of the runs that are not the project's own"""


def collect_states(
    module: ModuleType, learner: Any, args: Any, envs: Any, num_states: int, every: int, random_actions: float
) -> tuple[np.ndarray, np.ndarray]:
    """Play on in `envs` (what `make_envs` made of args) and keep every so many-th step until there are enough states.

    Returns the states (num_states, 4, 96, 96) uint8 and their rooms (num_states,) int.
    """
    rng, device = np.random.default_rng(args.seed), next(learner.agent.parameters()).device
    states, rooms, last_ram, first = [], [], envs.infos[0]["ram"], np.ones(args.num_envs, bool)
    current = np.full(args.num_envs, -1)
    with tqdm(total=num_states, unit=" states", disable=None) as bar:  # None: only in a terminal
        for step in itertools.count(1):
            obs = envs.next_obs[0]  # all games form one group
            seen = module.rooms_of(envs.game, envs.infos[0]["ram"], last_ram, first)
            current = np.where(seen >= 0, seen, current)
            if step % every == 0:
                keep = current >= 0
                states.extend(obs[keep])
                rooms.extend(current[keep])
                bar.update(keep.sum())
            if len(states) >= num_states:
                return np.stack(states[:num_states]), np.array(rooms[:num_states])
            actions = choose_actions(module, learner, args, torch.from_numpy(obs).to(device), greedy=False)
            explore = rng.random(args.num_envs) < random_actions
            actions[explore] = rng.integers(envs.num_actions, size=explore.sum())
            last_ram, first = envs.infos[0]["ram"], envs.resets.copy()
            envs.send(0, actions.astype(np.int32))
            envs.recv(0)


@torch.no_grad()
def look(module: ModuleType, learner: Any, args: Any, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The target's features (states, 512) and the intrinsic rewards (states,) float32, normalised as the run does."""
    device, features, rewards = next(learner.target.parameters()).device, [], []
    for chunk in torch.from_numpy(states).split(256):
        obs = chunk.to(device)
        x = module.novelty_input(obs, learner.obs_stats, args.norm_obs)
        features.append(learner.target(x).cpu().numpy())
        rewards.append(intrinsic_rewards(module, learner, args, obs))
    return np.concatenate(features), np.concatenate(rewards)


def room_numbers(features: np.ndarray, rooms: np.ndarray) -> dict[str, float]:
    """Purity of the nearest neighbours, its chance level, and the spread in rooms, of features (states, dims)."""
    distances = pairwise_distances(features.astype(np.float64))
    others = ~np.eye(len(rooms), dtype=bool)
    same = (rooms[:, None] == rooms) & others
    nearest = np.argsort(np.where(others, distances, np.inf), axis=1, kind="stable")[:, :NEIGHBOURS]
    overall = distances[others].mean()
    each = [distances[np.ix_(rooms == room, rooms == room)] for room in np.unique(rooms)]
    # A mean over rooms, not over pairs: the room where the agent starts would drown the others.
    within = [block.sum() / (len(block) * (len(block) - 1)) for block in each if len(block) > 1]
    return {
        "room_purity": float(np.take_along_axis(same, nearest, axis=1).mean()),
        "room_purity_by_chance": float(same.sum() / others.sum()),
        "spread_in_rooms": float(np.mean(within) / overall) if overall > 0 else float("nan"),
    }


def draw(path: Path, game: str, points: dict[str, np.ndarray], rooms: np.ndarray, numbers: dict[str, dict]) -> None:
    """Write the figure as PNG and SVG: a panel per run, the same colours and markers of rooms in all."""
    size = (5 * len(points) + 1.5, 5)
    figure, panels = plt.subplots(1, len(points), figsize=size, layout="constrained", squeeze=False)
    for axes, (label, xy) in zip(panels[0], points.items(), strict=True):
        for i, room in enumerate(np.unique(rooms)):
            inside = rooms == room
            style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], rasterized=True)
            axes.scatter(*xy[inside].T, s=10, alpha=0.7, linewidths=0, label=f"{room} ({inside.sum():,})", **style)
        purity, chance, spread, _ = numbers[label].values()
        title = f"{label}\nroom purity {purity:.3f} (chance {chance:.3f}), spread in rooms {spread:.3f}"
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
    columns = 1 + len(np.unique(rooms)) // 20
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title="room (states)", loc="outside right center", markerscale=2, ncols=columns)
    figure.suptitle(f"{game}: the target's 512 features of the same {len(rooms):,} states")
    figure.savefig(f"{path}.png", dpi=150)
    figure.savefig(f"{path}.svg", dpi=150, metadata={"Date": None})
    plt.close(figure)


def markdown(game: str, numbers: dict[str, dict], rooms: np.ndarray) -> str:
    """The numbers as a table."""
    columns = ["room_purity", "room_purity_by_chance", "spread_in_rooms"]
    names = [f"room {room} ({(rooms == room).sum():,})" for room in np.unique(rooms)]
    shares, rewards = [], []
    for label, values in numbers.items():
        shares.append([label, *(f"{values[column]:.3f}" for column in columns)])
        rewards.append([label, *(f"{reward:.5f}" for reward in values["intrinsic_reward"].values())])
    lines = [f"{game}, {len(rooms):,} states in {len(names)} rooms, {NEIGHBOURS} neighbours", ""]
    lines += markdown_table(["run", "room purity", "by chance", "spread in rooms"], shares)
    lines += ["", *markdown_table(["mean intrinsic reward (states)", *names], rewards)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__.splitlines()[0], args=argv)
    check_least(options, states=NEIGHBOURS + 2, every=1, games=1, random_actions=0)
    if options.random_actions > 1:
        fail(f"--random-actions {options.random_actions}: must be at most 1")
    if not options.runs:
        fail("give the folders of runs, each with its checkpoint.pt")
    make_folder_of(options.output)
    policy = options.policy or options.runs[-1]
    loaded = load_runs([*options.runs, policy], options.script)
    games = {run: module.game_of(args) for run, (module, args, _) in loaded.items()}
    module, args, _ = loaded[policy]
    game, args = games[policy], replace(args, num_envs=options.games, seed=options.seed)
    if len(set(games.values())) > 1:
        fail("the runs play different games: " + ", ".join(f"{name} in {run}" for run, name in games.items()))
    if game not in module.ROOM_GAMES:
        fail(f"the rooms of {game} are unknown; they are known of {', '.join(sorted(module.ROOM_GAMES))}")

    envs = make_envs(module, args, options.seed)
    cuda = all(args.cuda for _, args, _ in loaded.values()) and torch.cuda.is_available()
    device, learners = torch.device("cuda" if cuda else "cpu"), {}
    for run, (its_module, its_args, checkpoint) in loaded.items():
        learners[run] = load_learner(its_module, its_args, checkpoint, envs.num_actions, device)
    torch.manual_seed(options.seed)
    chosen = (options.states, options.every, options.random_actions)
    states, rooms = collect_states(module, learners[policy], args, envs, *chosen)
    if len(np.unique(rooms)) == 1:
        fail(f"only room {rooms[0]} of {game} was seen: raise --random-actions, --every or --states")
    points, numbers = {}, {}
    for run in options.runs:
        module, args, checkpoint = loaded[run]
        step = checkpoint["counters"]["global_step"]
        label = f"{checkpoint['script']}, seed {args.seed}, {step:,} steps"
        label += f" ({run})" * (label in points)
        features, rewards = look(module, learners[run], args, states)
        by_room = {int(room): float(rewards[rooms == room].mean()) for room in np.unique(rooms)}
        numbers[label] = room_numbers(features, rooms) | {"intrinsic_reward": by_room}
        perplexity = min(30, (len(states) - 1) / 3)
        points[label] = TSNE(random_state=options.seed, perplexity=perplexity).fit_transform(features)
    text = markdown(game, numbers, rooms)
    record = {"game": game, "states": len(rooms), "neighbours": NEIGHBOURS, "policy": str(policy), "runs": numbers}
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "features"  # the same picture is the same file
    draw(options.output, game, points, rooms, numbers)
    Path(f"{options.output}.json").write_text(json.dumps(record, indent=2) + "\n")
    Path(f"{options.output}.md").write_text(text)
    print(f"\n{text}\n{options.output}.png, .svg, .json, .md")


if __name__ == "__main__":
    main()
