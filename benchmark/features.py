"""Do the target's features spread inside rooms? Two or more checkpoints look at the same states.

    python benchmark/features.py runs/RND_RUN runs/SND_RUN
    python benchmark/features.py runs/RND_RUN runs/SND_RUN --states 4000 --random-actions 0.5 --output figures/features

A figure of the targets' features by room (t-SNE) and the numbers that benchmark/README.md explains.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from cli import check_least, fail, make_folder_of, markdown_table
from curves import COLOURS, MARKERS, save_figure
from enjoy import Agent, load_agents
from matplotlib import pyplot as plt
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

NEIGHBOURS = 10


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
    agent: Agent, envs: Any, num_states: int, every: int, random_actions: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Play on in `envs` (of agent.make_envs) and keep every so many-th step until there are enough states.

    Returns the states (num_states, 4, 96, 96) uint8 and their rooms (num_states,) int.
    """
    rng, num_envs = np.random.default_rng(seed), len(envs.resets)
    states, rooms, last_ram, first = [], [], envs.infos[0]["ram"], np.ones(num_envs, bool)
    current = np.full(num_envs, -1)
    with tqdm(total=num_states, unit=" states", disable=None) as bar:  # None: only in a terminal
        for step in itertools.count(1):
            obs, ram = envs.next_obs[0], envs.infos[0]["ram"]  # all games form one group
            seen = agent.module.rooms_of(envs.game, ram, last_ram, first)
            current = np.where(seen >= 0, seen, current)
            if step % every == 0:
                keep = current >= 0
                states.extend(obs[keep])
                rooms.extend(current[keep])
                bar.update(keep.sum())
            if len(states) >= num_states:
                return np.stack(states[:num_states]), np.array(rooms[:num_states])
            actions, explore = agent.choose_actions(obs), rng.random(num_envs) < random_actions
            actions[explore] = rng.integers(envs.num_actions, size=explore.sum())
            last_ram, first = ram, envs.resets.copy()
            envs.send(0, actions)
            envs.recv(0)


@torch.no_grad()
def look(agent: Agent, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The target's features (states, 512) and the intrinsic rewards (states,) float32, normalised as the run does."""
    features, rewards = [], []
    for obs in np.array_split(states, len(states) // 256 + 1):
        x = agent.module.novelty_input(agent.tensor(obs), agent.learner.obs_stats, agent.args.norm_obs)
        features.append(agent.learner.target(x).cpu().numpy())
        rewards.append(agent.intrinsic_rewards(obs))
    return np.concatenate(features), np.concatenate(rewards)


def room_numbers(features: np.ndarray, rooms: np.ndarray) -> dict[str, float]:
    """Purity of the nearest neighbours, its chance level, and the spread in rooms, of features (states, dims)."""
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(features).kneighbors(return_distance=False)
    distances, others = pairwise_distances(features.astype(np.float64)), ~np.eye(len(rooms), dtype=bool)
    overall = distances[others].mean()
    each = [distances[np.ix_(rooms == room, rooms == room)] for room in np.unique(rooms)]
    # A mean over rooms, not over pairs: the room where the agent starts would drown the others.
    within = [block.sum() / (len(block) * (len(block) - 1)) for block in each if len(block) > 1]
    return {
        "room purity": float((rooms[nearest] == rooms[:, None]).mean()),
        "by chance": float((rooms[:, None] == rooms)[others].mean()),
        "spread in rooms": float(np.mean(within) / overall) if overall > 0 else float("nan"),
    }


def draw(path: Path, title: str, points: dict[str, np.ndarray], rooms: np.ndarray, numbers: dict[str, dict]) -> None:
    """Write the figure as PNG and SVG: a panel per run, the same colours and markers of rooms in all."""
    size = (5 * len(points) + 1.5, 5)
    figure, panels = plt.subplots(1, len(points), figsize=size, layout="constrained", squeeze=False)
    for axes, (label, xy) in zip(panels[0], points.items(), strict=True):
        for i, room in enumerate(np.unique(rooms)):
            inside = rooms == room
            style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], rasterized=True)
            axes.scatter(*xy[inside].T, s=10, alpha=0.7, linewidths=0, label=f"{room} ({inside.sum():,})", **style)
        purity, chance, spread = numbers[label].values()
        numbers_line = f"room purity {purity:.3f} (chance {chance:.3f}), spread in rooms {spread:.3f}"
        axes.set_title(f"{label}\n{numbers_line}", fontsize=10)
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
    columns = 1 + len(np.unique(rooms)) // 20
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title="room (states)", loc="outside right center", markerscale=2, ncols=columns)
    figure.suptitle(title)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__.splitlines()[0], args=argv)
    check_least(options, states=NEIGHBOURS + 2, every=1, games=1, random_actions=0)
    if options.random_actions > 1:
        fail(f"--random-actions {options.random_actions}: must be at most 1")
    if not options.runs:
        fail("give the folders of runs, each with its checkpoint.pt")
    make_folder_of(options.output)
    policy = options.policy or options.runs[-1]
    agents = load_agents([*options.runs, policy], options.script)
    games = {run: agent.module.game_of(agent.args) for run, agent in agents.items()}
    game, room_games = games[policy], agents[policy].module.ROOM_GAMES
    if len(set(games.values())) > 1:
        fail("the runs play different games: " + ", ".join(f"{name} in {run}" for run, name in games.items()))
    if game not in room_games:
        fail(f"the rooms of {game} are unknown; they are known of {', '.join(sorted(room_games))}")

    torch.manual_seed(options.seed)
    envs = agents[policy].make_envs(options.seed, options.games)
    how = (options.states, options.every, options.random_actions, options.seed)
    states, rooms = collect_states(agents[policy], envs, *how)
    if len(seen := np.unique(rooms)) == 1:
        fail(f"only room {rooms[0]} of {game} was seen: raise --random-actions, --every or --states")
    points, numbers, paid = {}, {}, []
    for run in options.runs:
        agent = agents[run]
        label = f"{agent.module.SCRIPT}, seed {agent.args.seed}, {agent.step:,} steps"
        label += f" ({run})" * (label in points)
        features, rewards = look(agent, states)
        numbers[label] = room_numbers(features, rooms)
        paid.append([label, *(f"{rewards[rooms == room].mean():.5f}" for room in seen)])
        perplexity = min(30, (len(states) - 1) / 3)
        points[label] = TSNE(random_state=options.seed, perplexity=perplexity).fit_transform(features)
    lines = [f"{game}, {len(rooms):,} states in {len(seen)} rooms, {NEIGHBOURS} neighbours", ""]
    shares = [[label, *(f"{number:.3f}" for number in its.values())] for label, its in numbers.items()]
    lines += markdown_table(["run", "room purity", "by chance", "spread in rooms"], shares)
    names = [f"room {room} ({(rooms == room).sum():,})" for room in seen]
    lines += ["", *markdown_table(["mean intrinsic reward (states)", *names], paid), ""]
    title = f"{game}: the target's 512 features of the same {len(rooms):,} states"
    draw(options.output, title, points, rooms, numbers)
    Path(f"{options.output}.md").write_text("\n".join(lines))
    print("\n".join(["", *lines, f"{options.output}.png, .svg, .md"]))


if __name__ == "__main__":
    main()
