"""Learning curves of many runs: a figure per game and metric, a table, and the curves as CSV.

    python benchmark/curves.py runs
    python benchmark/curves.py --runs "SND c4=runs/ppo_snd_c4/*" "RND c0=runs/ppo_rnd_c0/*" --output figures
    python benchmark/curves.py --runs SND=figures/curves.csv --reference others.csv --reference-methods ppo_rnd_1

Every point is a mean over a window of agent steps that ends there, never a maximum. Bands are 95 % stratified bootstrap
intervals over seeds (Agarwal et al. 2021, arXiv 2108.13264, by their library rliable).
"""

import glob
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import tyro
from cli import fail, markdown_table, one_line, warn
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from rliable.library import get_interval_estimates
from scipy.stats import trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # no screen is needed

# Metric: its tag in TensorBoard, and what its axis is called.
METRICS = {
    "score": ("charts/episodic_return", "score of a game"),
    "explored_rooms": ("charts/explored_rooms", "rooms found by all environments"),
    "intrinsic_reward": ("charts/intrinsic_reward", "intrinsic reward of a step"),
}
CSV_COLUMNS = ["game", "method", "seed", "agent_steps", *METRICS]
HYPERPARAMETERS = "hyperparameters/text_summary"
# Arguments that may differ between the seeds of one method: they name the run or say where it ran.
FREE_ARGS = {"seed", "env_id", "run_name", "resume", "total_timesteps", "checkpoint_interval", "track", "cuda"}
FREE_ARGS |= {"wandb_project_name", "wandb_entity", "torch_deterministic", "env_backend", "compile", "bf16"}
GAME_ALIASES = {"montezuma": "montezumarevenge", "pacman": "mspacman"}  # short names that published curves use
# Okabe and Ito's colours without yellow; lengths without a common factor, so that no two methods look alike.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<"]
GREYS = ["0.35", "0.55", "0.7"]
BOOTSTRAP_SAMPLES = 2000
# What is taken over seeds: its name, and the function (seeds, points) -> (points,).
STATISTICS = {
    "mean": ("mean", partial(np.mean, axis=0)),
    "iqm": ("interquartile mean", partial(trim_mean, proportiontocut=0.25, axis=0)),
}


@dataclass
class Options:
    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders with runs below them, or CSV files; a run's folder tells its method's name"""
    runs: tuple[str, ...] = ()
    """METHOD=PATH: runs of a method; a folder, a glob in quotes, or a CSV that this program wrote"""
    output: Path = Path("curves")
    """folder for the results"""
    statistic: Literal["mean", "iqm"] = "mean"
    """mean or interquartile mean over seeds"""
    window: int | float | None = None
    """agent steps that a point averages over; unset: about a fiftieth of the longest run, at most 1 M"""
    at: tuple[int | float, ...] = ()
    """agent steps of the table; unset: 1, 2, 5, 10, ... up to the end of the longest run"""
    reference: Path | None = None
    """CSV with curves of others, laid under the figures in grey"""
    reference_methods: tuple[str, ...] = ()
    """which of them; unset: all"""


@dataclass
class Run:
    """One seed: its log, a row for each of the agent steps (the index) with a column for each metric that it has."""

    game: str
    method: str
    seed: int
    source: Path
    log: pd.DataFrame
    args: dict[str, str] = field(default_factory=dict)

    @property
    def spacing(self) -> int:
        """The usual distance of two logs."""
        return int(np.median(np.diff(self.log.index, prepend=0)))

    @property
    def end(self) -> int:
        """The run got to all steps below this; a budget need not be a multiple of an iteration, hence `spacing`."""
        return int(self.log.index[-1]) + self.spacing


def game_key(name: str) -> str:
    """A game's name without the differences of spelling: "montezuma_revenge" and "MontezumaRevenge" are one."""
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    return GAME_ALIASES.get(key, key)


# ---- Reading ----


def method_of(run_dir: Path, game: str) -> str:
    """A method's name from a run's folder: the innermost part of the path that is neither the game nor the seed.

    "runs/ppo_snd_c4/Venture/seed_1" is ppo_snd_c4; "runs/Venture__ppo_snd_atari__1__1700000000" is ppo_snd_atari.
    """
    for part in reversed(run_dir.resolve().parts):
        if re.fullmatch(r"(seed)?[_-]?\d+", part) or game_key(part) == game_key(game):
            continue
        default_name = re.fullmatch(r"\w+?__(\w+?)__\d+__\d+", part)
        return default_name[1] if default_name else re.sub(r"[_-]+seed[_-]?\d+$", "", part)
    return run_dir.name


def read_events(run_dir: Path, method: str = "") -> Run:
    """One run from its event files, up to a damaged place; what a resumed run did twice counts once.

    Raises ValueError if it cannot be used.
    """
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()  # 0: keep all
    tags = events.Tags()
    logged = events.Tensors(HYPERPARAMETERS) if HYPERPARAMETERS in tags["tensors"] else []  # one of each start
    texts = [event.tensor_proto.string_val[0].decode() for event in logged]
    tables = [dict(re.findall(r"^\|(\w+)\|(.*)\|$", text, re.M)) for text in texts]
    if not tables or not all({"env_id", "seed"} <= table.keys() for table in tables):
        raise ValueError(f"no {HYPERPARAMETERS} of these scripts")
    args = tables[-1]
    match = re.fullmatch(r"(\w+?)NoFrameskip-v4|(?:ALE/)?(\w+)-v5", args["env_id"])
    if not match:
        raise ValueError(f"unknown env_id {args['env_id']}")
    scalars = {metric: events.Scalars(tag) for metric, (tag, _) in METRICS.items() if tag in tags["scalars"]}
    if "intrinsic_reward" not in scalars:  # which every iteration logs
        raise ValueError("it has logged nothing yet")
    if changed := {name for table in tables for name, _ in table.items() ^ args.items()} - FREE_ARGS:
        warn(f"{run_dir} was resumed with another {', '.join(sorted(changed))}")
    series = {metric: pd.Series({event.step: event.value for event in logged}) for metric, logged in scalars.items()}
    game = match[1] or match[2]
    return Run(game, method or method_of(run_dir, game), int(args["seed"]), run_dir, pd.DataFrame(series), args)


def read_csv(path: Path, method: str = "") -> list[Run]:
    """The runs of a CSV with the columns game, method, seed, agent_steps and at least one metric; raises ValueError.

    A metric's column may have the name of its tag. Of several methods `method` picks one; a single one it renames.
    """
    table = pd.read_csv(path, dtype={"game": str, "method": str})
    table = table.rename(columns={tag: metric for metric, (tag, _) in METRICS.items()})
    metrics = [metric for metric in METRICS if metric in table]
    missing = [name for name in CSV_COLUMNS[:4] if name not in table] or ([] if metrics else ["score"])
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; expected: {', '.join(CSV_COLUMNS)}")
    table = table.astype({"seed": int, "agent_steps": int} | dict.fromkeys(metrics, float))
    names = table["method"].unique()
    if method in names:
        table = table[table["method"] == method]
    elif method and len(names) > 1:
        raise ValueError(f"it holds several methods, none is {method}: {', '.join(names)}")
    return [
        Run(game, method or name, seed, path, rows.set_index("agent_steps")[metrics].sort_index())
        for (game, name, seed), rows in table.groupby(["game", "method", "seed"], sort=False)
    ]


def find_runs(options: Options) -> list[Run]:
    """All runs that the command line names; one that cannot be used is a warning, if none can be used exit status 2."""
    patterns = [("", path) for path in options.paths] + [spec.partition("=")[::2] for spec in options.runs]
    if not patterns or not all(path for _, path in patterns):
        fail("name the runs: folders, or --runs METHOD=PATH")
    runs, reasons = [], []
    for method, pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern)))]
        sources = [path for path in paths if path.suffix == ".csv"]
        sources += sorted({file.parent for path in paths for file in path.rglob("events.out.tfevents.*")})
        if not sources:
            reasons.append(f"{pattern}: no runs found (neither event files of TensorBoard below it nor a CSV)")
        for source in sources:
            try:
                runs += read_csv(source, method) if source.suffix == ".csv" else [read_events(source, method)]
            except Exception as error:  # whatever a damaged or foreign file makes its reader raise
                reasons.append(f"{source}: {one_line(error)}")
    if options.window is None and runs:
        options.window = default_window(runs)
    short = [run for run in runs if run.end <= options.window]
    reasons += [f"{run.source}: shorter than the window of {options.window:,} steps" for run in short]
    runs = [run for run in runs if run.end > options.window]
    if not runs:
        fail(f"no usable run: {'; '.join(reasons) or 'no rows'}")
    for reason in reasons:
        warn(f"left out: {reason}")
    return runs


def check_runs(runs: list[Run]) -> None:
    """Refuse a seed given twice, and seeds of one method that were run with different arguments; exit status 2."""
    first: dict[tuple, Run] = {}
    for run in runs:
        name, advice = f"{run.method}, {run.game}", "give them different method names with --runs METHOD=PATH"
        if (twin := first.setdefault((run.game, run.method, run.seed), run)) is not run:
            fail(f"seed {run.seed} of {name} is in {twin.source} and again in {run.source}; leave one out, or {advice}")
        other = first.setdefault((run.game, run.method), run)
        if differ := {key for key, value in run.args.items() if other.args.get(key, value) != value} - FREE_ARGS:
            fail(f"{other.source} and {run.source} of {name} differ in {', '.join(sorted(differ))}; {advice}")


def read_references(options: Options, games: list[str]) -> list[Run]:
    """The curves to lie under the figures; exit status 2 if a method is not there."""
    if options.reference is None:
        return []
    try:
        runs = read_csv(options.reference)
    except (OSError, ValueError) as error:
        fail(f"--reference {options.reference}: {one_line(error)}")
    wanted = options.reference_methods or {run.method for run in runs}
    if unknown := set(wanted) - {run.method for run in runs}:
        fail(f"{options.reference} has no method {', '.join(sorted(unknown))}")
    runs = [run for run in runs if run.method in wanted]
    for game in games:
        if game_key(game) not in {game_key(run.game) for run in runs}:
            warn(f"{options.reference} holds no such curve of {game}")
    return runs


# ---- Statistics ----


def default_window(runs: list[Run]) -> int:
    """About a fiftieth of the longest run, at most 1 M steps and at least an iteration: 1, 2 or 5 and zeros."""
    fiftieth = min(1_000_000, max(run.end for run in runs) / 50)
    return next(round_numbers(max(fiftieth, *(run.spacing for run in runs))))


def round_numbers(least: float) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, 100, ... from `least` on."""
    numbers = (digit * 10**zeros for zeros in itertools.count() for digit in (1, 2, 5))
    return itertools.dropwhile(lambda number: number < least, numbers)


def default_table_steps(runs: list[Run], window: int) -> list[int]:
    """The round numbers from the window to the end of the longest run, and that end."""
    end = (max(run.end for run in runs) - 1) // window * window
    return [*itertools.takewhile(lambda steps: steps < end, round_numbers(window)), end]


def window_means(runs: list[Run], window: int, points: list[int] | None = None) -> pd.DataFrame:
    """What each run logged in (point - window, point] on average: CSV_COLUMNS, a row for each run and point it got to.

    The points are those given, or else all multiples of the window. nan where nothing was logged.
    """
    rows = []
    for run in runs:
        steps, ends = run.log.index, range(window, run.end, window)
        if points is not None:
            ends = [point for point in points if point < run.end]
        for end in ends:
            means = run.log[(steps > end - window) & (steps <= end)].mean()
            rows.append({"game": run.game, "method": run.method, "seed": run.seed, "agent_steps": end, **means})
    return pd.DataFrame(rows, columns=CSV_COLUMNS).astype(dict.fromkeys(METRICS, float))


def aggregate(values: np.ndarray, statistic: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean or IQM over the seeds of (seeds, points) and its 95 % interval, each (points,); one seed has none: nan."""
    over_seeds = STATISTICS[statistic][1]
    if len(values) == 1 or not values.size:
        return over_seeds(values), *np.full((2, values.shape[1]), np.nan)
    np.random.seed(0)  # rliable draws from the global generator
    scores = {"": values[:, None, :]}  # (runs, tasks, points): a game is one stratum
    _, interval = get_interval_estimates(scores, lambda x: over_seeds(x[:, 0]), reps=BOOTSTRAP_SAMPLES)
    return over_seeds(values), *interval[""]


# ---- Output ----


def by_seed(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A method's rows of `window_means` as (points, seeds); straight lines bridge windows in which no game ended."""
    seeds = rows.pivot(index="agent_steps", columns="seed", values=metric)
    return seeds.dropna(axis=1, how="all").interpolate(limit_area="inside")


def add_lines(axes: plt.Axes, seeds: pd.DataFrame, name: str, statistic: str, **style: object) -> int:
    """Draw a method's (points, seeds); returns the number of seeds.

    Where all seeds have got: their mean and its interval; from there on each further seed as a thin line.
    """
    common, count = seeds.dropna(), len(seeds.columns)
    if count:
        value, low, high = aggregate(common.to_numpy().T, statistic)
        axes.plot(common.index, value, label=f"{name} ({count} seed{'s' * (count > 1)})", **style)
        axes.fill_between(common.index, low, high, color=style["color"], alpha=0.2, linewidth=0)
        rest = seeds[seeds.index >= max(common.index, default=0)]
        if len(rest) > 2:  # one more window is no line
            axes.plot(rest, color=style["color"], linewidth=1, alpha=0.8, zorder=1)
    return count


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG and SVG, the same picture as the same files."""
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(f"{path}.png", dpi=150)
        figure.savefig(f"{path}.svg", dpi=150, metadata={"Date": None})


def draw(
    path: Path, metric: str, curves: pd.DataFrame, references: pd.DataFrame, methods: list[str], options: Options
) -> bool:
    """Write the figure of a game and metric as PNG and SVG; False if there is nothing to draw.

    `curves` and `references` are the game's rows of `window_means`; `methods` are all methods of all figures: each
    keeps its colour, line and marker everywhere.
    """
    end, counts = curves["agent_steps"].max(), []
    figure, axes = plt.subplots(layout="constrained")
    for i, (method, rows) in enumerate(references.groupby("method", sort=False)):
        style = dict(color=GREYS[i % len(GREYS)], linestyle=LINES[i % len(LINES)], linewidth=1.2, zorder=1)
        seeds = by_seed(rows, metric).loc[:end]
        counts.append(add_lines(axes, seeds, f"author's {method}", options.statistic, **style))
    drawn = 0
    for method, rows in curves.groupby("method", sort=False):
        seeds, i = by_seed(rows, metric), methods.index(method)
        every = max(1, len(seeds) // 8)
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)])
        style |= dict(markevery=(i % every, every), markersize=5, linewidth=1.8)
        counts.append(add_lines(axes, seeds, method, options.statistic, **style))
        drawn += counts[-1]
    if drawn:
        window = EngFormatter()(options.window)
        axes.set(title=curves["game"].iloc[0], ylabel=METRICS[metric][1])
        axes.set_xlim(0, end * (2 if end == options.window else 1.02))  # a single point stands in the middle
        axes.set_xlabel(f"agent steps of 4 frames (each point: the mean of the {window} before it)")
        axes.xaxis.set_major_formatter(EngFormatter())
        if metric == "intrinsic_reward":
            axes.set_yscale("log")  # it falls by orders of magnitude
        elif axes.dataLim.y0 >= 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        title = f"{STATISTICS[options.statistic][0]} over seeds, band: 95 % bootstrap interval"
        place = dict(loc="outside lower center", ncols=2, frameon=False, handlelength=3, columnspacing=1.5)
        legend = figure.legend(title=title if max(counts) > 1 else None, **place)
        figure.set_size_inches(6, 3.6 + 0.11 * len(legend.texts))
        save_figure(figure, path)
    plt.close(figure)
    return drawn > 0


def table_rows(runs: list[Run], games: list[str], options: Options) -> pd.DataFrame:
    """Score and rooms at `options.at` steps, a row per game, metric, method and step that a seed has got to."""
    means, rows = window_means(runs, options.window, options.at), []
    for game, metric in itertools.product(games, ["score", "explored_rooms"]):
        known = means[(means["game"] == game) & means[metric].notna()]
        for (method, step), seeds in known.groupby(["method", "agent_steps"], sort=False)[metric]:
            (value,), (low,), (high,) = aggregate(seeds.to_numpy()[:, None], options.statistic)
            rows.append((game, metric, method, step, value, low, high, len(seeds)))
    return pd.DataFrame(rows, columns=["game", "metric", "method", "agent_steps", "value", "low", "high", "seeds"])


def markdown(table: pd.DataFrame, options: Options) -> str:
    """The table for people: a block per game and metric, a row per method, a column per step."""
    lines = [
        f"Each value is the {STATISTICS[options.statistic][0]} over seeds of what a seed logged, on average, in the "
        f"{options.window:,} agent steps before that point; in brackets its 95 % bootstrap interval (none for one "
        "seed), then the number of seeds. Blank: no run has got there."
    ]
    for (game, metric), block in table.groupby(["game", "metric"], sort=False):
        digits, texts = 1 if block["value"].max() < 100 else 0, []
        for row in block.itertuples():
            interval = f" [{row.low:,.{digits}f}, {row.high:,.{digits}f}]" if row.seeds > 1 else ""
            texts.append(f"{row.value:,.{digits}f}{interval} ({row.seeds})")
        cells = block.assign(text=texts).pivot(index="method", columns="agent_steps", values="text").fillna("")
        lines += ["", f"**{game}, {metric.replace('_', ' ')}**", ""]
        rows = [[method, *cells.loc[method]] for method in block["method"].unique()]
        lines += markdown_table(["method", *map(EngFormatter(), cells.columns)], rows)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__.splitlines()[0], args=argv)
    for steps in (*options.at, 1 if options.window is None else options.window):
        if not 1 <= steps < math.inf:
            fail(f"{steps} is no number of agent steps: --window and --at take at least 1, for instance 1e6")
    options.window = options.window and int(options.window)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every resume
    runs = find_runs(options)
    spelling: dict[str, str] = {}
    for run in runs:
        run.game = spelling.setdefault(game_key(run.game), run.game)
    check_runs(runs)
    games, methods = sorted(spelling.values()), list(dict.fromkeys(run.method for run in runs))
    references = read_references(options, games)
    options.at = [int(steps) for steps in options.at] or default_table_steps(runs, options.window)

    curves = window_means(runs, options.window)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for game, metric in itertools.product(games, METRICS):
            path = options.output / f"{game}_{metric}"
            others = [run for run in references if game_key(run.game) == game_key(game)]
            below = window_means(others, options.window) if others else curves[:0]
            if draw(path, metric, curves[curves["game"] == game], below, methods, options):
                print(f"{path}.png, .svg")
        table = table_rows(runs, games, options)
        table.to_csv(options.output / "table.csv", index=False, float_format="%.6g")
        (options.output / "table.md").write_text(text := markdown(table, options))
        curves.to_csv(options.output / "curves.csv", index=False, float_format="%.6g")
    except OSError as error:
        fail(f"cannot write to {options.output}: {error.strerror}")
    print(f"{options.output}/table.md, table.csv, curves.csv\n\n{text}")


if __name__ == "__main__":
    main()
