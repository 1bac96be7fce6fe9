"""Learning curves of many runs: a figure per game and metric, a table, and the curves as CSV.

    python benchmark/curves.py runs
    python benchmark/curves.py --runs "SND c4=runs/ppo_snd_c4/*" "RND c0=runs/ppo_rnd_c0/*" --output figures
    python benchmark/curves.py --runs SND=figures/curves.csv --reference others.csv --reference-methods ppo_rnd_1

Every point is a mean over a window of agent steps that ends there, never a maximum. Bands are 95 % stratified bootstrap
intervals over seeds (Agarwal et al. 2021, arXiv 2108.13264, by their library rliable).
"""

import argparse
import contextlib
import glob
import itertools
import logging
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from cli import fail, warn
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from rliable.library import get_interval_estimates
from scipy.stats import trim_mean
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OpError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

# Metric: its tag in TensorBoard, and what its axis is called.
METRICS = {
    "score": ("charts/episodic_return", "score of a game"),
    "explored_rooms": ("charts/explored_rooms", "rooms found by all environments"),
    "intrinsic_reward": ("charts/intrinsic_reward", "intrinsic reward of a step"),
}
HYPERPARAMETERS = "hyperparameters/text_summary"
CSV_COLUMNS = ["game", "method", "seed", "agent_steps", *METRICS]
TABLE_STEPS = [million * 1_000_000 for million in (1, 2, 5, 10, 20, 32, 64, 128)]
# Arguments that may differ between the seeds of one method: they name the run or say where it ran.
FREE_ARGS = {"seed", "env_id", "run_name", "resume", "total_timesteps", "checkpoint_interval", "track", "cuda"}
FREE_ARGS |= {"wandb_project_name", "wandb_entity", "torch_deterministic", "env_backend", "compile", "bf16"}
GAME_ALIASES = {"montezuma": "montezumarevenge", "pacman": "mspacman"}  # short names that published curves use
# Okabe and Ito's colours without yellow; lengths without a common factor, so that no two methods look alike.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<"]
GREYS = ["0.35", "0.55", "0.7"]
MAX_REFERENCES = 6  # more grey lines cannot be told apart
BOOTSTRAP_SAMPLES = 2000
# What is taken over seeds: its name, and the function (seeds, points) -> (points,).
STATISTICS = {
    "mean": ("mean", partial(np.mean, axis=0)),
    "iqm": ("interquartile mean", partial(trim_mean, proportiontocut=0.25, axis=0)),
}


@dataclass
class Run:
    """One seed: {metric: (agent steps (n,), values (n,))}, the last step logged and the usual distance of two logs."""

    game: str
    method: str
    seed: int
    source: Path
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    last_step: int
    spacing: int
    args: dict[str, str] = field(default_factory=dict)

    def reached(self, steps: np.ndarray) -> np.ndarray:
        """Whether the run got to these steps; a budget need not be a multiple of an iteration, hence `spacing`."""
        return self.last_step + self.spacing > steps


def game_key(name: str) -> str:
    """A game's name without the differences of spelling: "montezuma_revenge" and "MontezumaRevenge" are one."""
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    return GAME_ALIASES.get(key, key)


# ---- Reading ---------------------------------------------------------------------------------------------------------


def is_damaged(path: Path) -> bool:
    """Whether an event file cannot be read to its end: half-written, or a checksum is wrong."""
    reader = PyRecordReader_New(str(path))
    with contextlib.suppress(OutOfRangeError):  # the end
        try:
            while True:
                reader.GetNext()
        except DataLossError:
            return True
    return False


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


def read_events(run_dir: Path, method: str | None) -> Run:
    """One run from its event files; what a resumed run did twice counts once. Exit status 2 if it cannot be used."""
    broken = [path.name for path in sorted(run_dir.glob("events.out.tfevents.*")) if is_damaged(path)]
    note = f" ({broken[0]} is half-written or damaged)" if broken else ""
    events = event_accumulator.EventAccumulator(str(run_dir), {event_accumulator.SCALARS: 0})
    events.Reload()
    tags = events.Tags()
    logged = events.Tensors(HYPERPARAMETERS) if HYPERPARAMETERS in tags["tensors"] else []
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in logged}  # one of each start
    tables = [dict(re.findall(r"^\|(\w+)\|(.*)\|$", text, re.M)) for text in texts.values()]
    if not tables or not all({"env_id", "seed"} <= table.keys() for table in tables):
        fail(f"{run_dir} has no {HYPERPARAMETERS} of these scripts{note}: leave it out")
    if len({table["env_id"] for table in tables}) > 1:
        fail(f"{run_dir} mixes the event files of several games: move each run to a folder of its own")
    args = tables[-1]
    match = re.fullmatch(r"(\w+?)NoFrameskip-v4|(?:ALE/)?(\w+)-v5", args["env_id"])
    if not match:
        fail(f"{run_dir} has the unknown env_id {args['env_id']}")
    if METRICS["intrinsic_reward"][0] not in tags["scalars"]:
        fail(f"{run_dir} has no {METRICS['intrinsic_reward'][0]}{note}: it has logged nothing yet, leave it out")
    if broken:
        warn(f"{run_dir}/{broken[0]} is half-written or damaged; its records up to there are used")
    if changed := {name for table in tables for name, _ in table.items() ^ args.items()} - FREE_ARGS:
        warn(f"{run_dir} was resumed with another {', '.join(sorted(changed))}")
    game, series = match[1] or match[2], {}
    for metric, (tag, _) in METRICS.items():
        if tag in tags["scalars"]:
            logged = events.Scalars(tag)
            series[metric] = np.array([e.step for e in logged]), np.array([e.value for e in logged])
    if "score" not in series:
        warn(f"{run_dir} has no {METRICS['score'][0]}: no game has ended in it yet")
    steps = series["intrinsic_reward"][0]  # logged in every iteration
    spacing = int(np.median(np.diff(steps, prepend=0)))
    name = method or method_of(run_dir, game)
    return Run(game, name, int(args["seed"]), run_dir, series, int(steps[-1]), spacing, args)


def read_csv(path: Path, method: str | None = None) -> list[Run]:
    """The runs of a CSV with the columns game, method, seed, agent_steps and at least one metric; exit status 2.

    A metric's column may have the name of its tag. Of several methods `method` picks one; a single one it renames.
    """
    try:
        table = pd.read_csv(path, dtype={"game": str, "method": str})
        table = table.rename(columns={tag: metric for metric, (tag, _) in METRICS.items()})
        missing = [name for name in CSV_COLUMNS[:4] if name not in table] or (
            [] if set(METRICS) & set(table) else ["score"]
        )
        if missing:
            fail(f"{path} has no column {', '.join(missing)}; expected: {', '.join(CSV_COLUMNS)}")
        columns = ["agent_steps", *(metric for metric in METRICS if metric in table)]
        table = table.astype({"seed": int} | dict.fromkeys(columns, float)).sort_values("agent_steps", kind="stable")
        if not (table["agent_steps"] >= 0).all():
            raise ValueError("agent_steps must be at least 0")
        table = table[table["agent_steps"] > 0]  # before the first step there is nothing to average
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        fail(f"{path} is not a readable CSV of curves: {str(error).splitlines()[0]}")
    names = table["method"].unique()
    if method in names:
        table = table[table["method"] == method]
    elif method and len(names) > 1:
        fail(f"{path} holds several methods, none is {method}: {', '.join(names)}")
    runs = []
    for (game, name, seed), rows in table.groupby(["game", "method", "seed"], sort=False):
        steps = rows["agent_steps"].to_numpy()
        series = {metric: rows[metric].to_numpy() for metric in columns[1:]}
        series = {
            metric: (steps[~np.isnan(y)], y[~np.isnan(y)]) for metric, y in series.items() if not np.isnan(y).all()
        }
        spacing = int(np.median(np.diff(steps, prepend=0)))
        runs.append(Run(game, method or name, seed, path, series, int(steps[-1]), spacing))
    if not runs:
        fail(f"{path} holds no rows")
    return runs


def find_runs(pattern: str, method: str | None) -> list[Run]:
    """All runs in the folders, or the CSV files, that `pattern` names; exit status 2 if there are none."""
    runs = []
    named = Path(pattern).expanduser()
    for path in [named] if named.exists() else map(Path, sorted(glob.glob(str(named)))):
        if path.suffix == ".csv":
            runs += read_csv(path, method)
        else:
            folders = sorted({file.parent for file in path.rglob("events.out.tfevents.*")})
            try:
                runs += [read_events(folder, method) for folder in folders]
            except (OSError, OpError) as error:
                fail(f"{path} cannot be read: {error}")
    if not runs:
        fail(f"{pattern}: no runs found (neither event files of TensorBoard below it nor a CSV)")
    return runs


def check_runs(runs: list[Run]) -> None:
    """Refuse a seed given twice, and seeds of one method that were run with different arguments; exit status 2."""
    first: dict[tuple, Run] = {}
    for run in runs:
        name = f"{run.method}, {run.game}"
        twin = first.setdefault((run.game, run.method, run.seed), run)
        if twin is not run:
            twice = f"seed {run.seed} of {name} is there twice: {twin.source} and {run.source}"
            fail(f"{twice}; leave one out, or give them different method names with --runs METHOD=PATH")
        other = first.setdefault((run.game, run.method), run)
        for key in sorted((set(run.args) & set(other.args)) - FREE_ARGS):
            if run.args[key] != other.args[key]:
                fail(
                    f"the runs of {name} differ in {key}: {other.args[key]} in {other.source}, {run.args[key]} in "
                    f"{run.source}; give them different method names with --runs METHOD=PATH"
                )


# ---- Statistics ------------------------------------------------------------------------------------------------------


def window_means(steps: np.ndarray, values: np.ndarray, points: np.ndarray, window: int) -> np.ndarray:
    """Mean of the values (n,) logged at `steps` in (point - window, point], for each point; nan where there is none."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start, end = (np.searchsorted(steps, edge, side="right") for edge in (points - window, points))
    count = end - start
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def seed_matrix(runs: list[Run], metric: str, points: np.ndarray, window: int) -> np.ndarray:
    """Window means (runs, points); nan where a run has not got to or has logged nothing."""
    rows = [
        np.where(run.reached(points), window_means(*run.series[metric], points, window), np.nan)
        for run in runs
        if metric in run.series
    ]
    return np.array(rows).reshape(len(rows), len(points))


def fill_gaps(matrix: np.ndarray) -> np.ndarray:
    """Straight lines through the gaps of each row of (seeds, points); nan before its first value and after its last."""
    filled, x = matrix.copy(), np.arange(matrix.shape[1])
    for row in filled:
        known = ~np.isnan(row)
        if known.any():
            row[:] = np.interp(x, x[known], row[known], left=np.nan, right=np.nan)
    return filled


def aggregate(matrix: np.ndarray, statistic: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean or IQM over the seeds of (seeds, points), its 95 % interval, and the seeds counted, each (points,).

    One seed has no interval: nan.
    """
    known = ~np.isnan(matrix)
    count = known.sum(axis=0)
    value, low, high = np.full((3, matrix.shape[1]), np.nan)
    over_seeds = STATISTICS[statistic][1]
    np.random.seed(0)  # rliable draws from the global generator
    for pattern in np.unique(known, axis=1).T:  # points that the same seeds have reached
        columns = (known == pattern[:, None]).all(axis=0)
        seeds = matrix[pattern][:, columns]
        if len(seeds):
            value[columns] = over_seeds(seeds)
        if len(seeds) > 1:
            scores = {"": seeds[:, None, :]}  # (runs, tasks, points): a game is one stratum
            _, interval = get_interval_estimates(scores, lambda x: over_seeds(x[:, 0]), reps=BOOTSTRAP_SAMPLES)
            low[columns], high[columns] = interval[""]
    return value, low, high, count


def default_window(runs: list[Run]) -> int:
    """A fiftieth of the longest run, at most 1 M steps and at least an iteration, rounded up to one digit."""
    window = max(min(1_000_000, max(run.last_step for run in runs) / 50), max(run.spacing for run in runs))
    digit = 10 ** math.floor(math.log10(window))
    return math.ceil(window / digit) * digit


def grid_of(runs: list[Run], window: int) -> np.ndarray:
    """The multiples of `window` that at least one of the runs has reached."""
    count = max(math.ceil((run.last_step + run.spacing) / window) - 1 for run in runs)
    return window * np.arange(1, count + 1)


def by_method(runs: list[Run], game: str) -> dict[str, list[Run]]:
    """{method: its runs of a game}, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if game_key(run.game) == game_key(game):
            groups.setdefault(run.method, []).append(run)
    return groups


# ---- Output ----------------------------------------------------------------------------------------------------------


def count_text(count: np.ndarray) -> str:
    """ "1 seed", "3 seeds", or "1-3 seeds" where runs have different lengths."""
    low, high = int(count[count > 0].min()), int(count.max())
    return f"{high} seed{'s' * (high > 1)}" if low == high else f"{low}–{high} seeds"


def draw(
    path: Path, game: str, metric: str, runs: list[Run], references: list[Run], methods: list[str], options
) -> bool:
    """Write the figure of a game and metric as PNG and SVG; False if there is nothing to draw.

    `methods` are all methods of all figures: each keeps its colour, line and marker everywhere.
    """
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    grid, drawn = grid_of(list(itertools.chain(*by_method(runs, game).values())), options.window), False
    for i, (method, group) in enumerate(by_method(references, game).items()):
        matrix = seed_matrix(group, metric, grid, options.window)
        value, _, _, count = aggregate(fill_gaps(matrix), options.statistic)
        if count.any():
            style = dict(color=GREYS[i % len(GREYS)], linestyle=LINES[i % len(LINES)], linewidth=1.2, zorder=1)
            axes.plot(grid, value, label=f"reference: {method} ({count_text(count)})", **style)
    for method, group in by_method(runs, game).items():
        matrix = seed_matrix(group, metric, grid, options.window)
        value, low, high, count = aggregate(fill_gaps(matrix), options.statistic)
        if not count.any():
            continue
        i, drawn = methods.index(method), True
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)])
        every = max(1, len(grid) // 8)
        label = f"{method} ({count_text(count)})"
        axes.plot(grid, value, label=label, markevery=(i % every, every), markersize=5, linewidth=1.8, **style)
        axes.fill_between(grid, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if drawn:
        window = EngFormatter()(options.window)
        axes.set(title=game, ylabel=METRICS[metric][1], xlim=(0, grid[-1] * 1.02))
        axes.set_xlabel(f"agent steps, 4 frames each (a point is the mean of the {window} steps before it)")
        axes.xaxis.set_major_formatter(EngFormatter())
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        title = f"{STATISTICS[options.statistic][0]} over seeds,\nband: 95 % bootstrap interval"
        axes.legend(
            title=title, alignment="left", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, handlelength=3.5
        )
        figure.savefig(f"{path}.png", dpi=150)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
    plt.close(figure)
    return drawn


def table_rows(runs: list[Run], games: list[str], options) -> pd.DataFrame:
    """Score and rooms at `options.at` steps, a row per game, metric, method and step; nan where no seed has got to."""
    rows, points = [], np.array(options.at)
    for game, metric in itertools.product(games, ["score", "explored_rooms"]):
        for method, group in by_method(runs, game).items():
            columns = aggregate(seed_matrix(group, metric, points, options.window), options.statistic)
            for step, value, low, high, count in zip(options.at, *columns, strict=True):
                rows.append((game, metric, method, step, value, low, high, count))
    return pd.DataFrame(rows, columns=["game", "metric", "method", "agent_steps", "value", "low", "high", "seeds"])


def markdown(table: pd.DataFrame, options) -> str:
    """The table for people: a block per game and metric, a row per method, a column per step."""
    lines = [
        f"Each value is the {STATISTICS[options.statistic][0]} over seeds of what a seed logged, on average, in the "
        f"{options.window:,} agent steps before that point; in brackets its 95 % bootstrap interval (none for one "
        "seed), then the number of seeds. Blank: no run has got there."
    ]
    for (game, metric), block in table.groupby(["game", "metric"], sort=False):
        if not block["seeds"].any():
            continue
        digits = 1 if block["value"].max() < 100 else 0
        lines += ["", f"**{game}, {metric.replace('_', ' ')}**", ""]
        lines += [f"| method | {' | '.join(EngFormatter()(step) for step in options.at)} |"]
        lines += ["|---" * (len(options.at) + 1) + "|"]
        for method, cells in block.groupby("method", sort=False):
            texts = []
            for cell in cells.itertuples():
                interval = f" [{cell.low:,.{digits}f}, {cell.high:,.{digits}f}]" if cell.seeds > 1 else ""
                texts.append(f"{cell.value:,.{digits}f}{interval} ({cell.seeds})" if cell.seeds else "")
            lines.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def curve_rows(runs: list[Run], window: int) -> pd.DataFrame:
    """Every run on the grid, as a CSV that this program reads again."""
    rows = []
    for run in runs:
        grid = grid_of([run], window)
        nothing = np.empty(0), np.empty(0)
        columns = [window_means(*run.series.get(metric, nothing), grid, window) for metric in METRICS]
        rows += [(run.game, run.method, run.seed, *cells) for cells in zip(grid, *columns, strict=True)]
    return pd.DataFrame(rows, columns=CSV_COLUMNS)


def step_count(text: str) -> int:
    """A number of agent steps, at least 1, also written as 1e6; exit status 2."""
    try:
        steps = int(float(text))
    except (ValueError, OverflowError):
        steps = 0
    if steps < 1:
        fail(f"{text} is no number of agent steps: give one of at least 1, for instance 1e6")
    return steps


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="folders with runs below them; a run's folder tells its method's name")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        action="extend",
        metavar="METHOD=PATH",
        help="runs of a method: a folder, a glob in quotes, or a CSV that this program wrote",
    )
    parser.add_argument("--output", type=Path, default=Path("curves"), help="folder for the results (default: curves)")
    parser.add_argument("--statistic", choices=list(STATISTICS), default="mean", help="over seeds (default: mean)")
    parser.add_argument(
        "--window",
        type=step_count,
        help="agent steps that a point averages over (default: a fiftieth of the longest run, at most 1 M)",
    )
    parser.add_argument(
        "--at",
        type=step_count,
        nargs="+",
        default=TABLE_STEPS,
        metavar="STEP",
        help="agent steps of the table (default: 1, 2, 5, 10, 20, 32, 64 and 128 M)",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="CSV", help="curves of others, laid under the figures in grey"
    )
    parser.add_argument("--reference-methods", nargs="+", metavar="METHOD", help="which of them (default: all)")
    return parser.parse_args(argv)


def read_references(options: argparse.Namespace, games: list[str]) -> list[Run]:
    """The curves to lie under the figures; exit status 2 if a method is not there or a figure would get too many."""
    if options.reference is None:
        return []
    runs = read_csv(options.reference)
    unknown = set(options.reference_methods or []) - {run.method for run in runs}
    if unknown:
        fail(f"{options.reference} has no method {', '.join(sorted(unknown))}")
    runs = [run for run in runs if options.reference_methods is None or run.method in options.reference_methods]
    for game in games:
        methods = list(by_method(runs, game))
        if len(methods) > MAX_REFERENCES:
            choice = f"choose at most {MAX_REFERENCES} with --reference-methods from: {', '.join(methods)}"
            fail(f"{options.reference} holds {len(methods)} methods of {game}; {choice}")
        if not methods:
            warn(f"{options.reference} holds no such curve of {game}")
    return runs


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    if not options.paths and not options.runs:
        fail("no runs given: name a folder, or --runs METHOD=PATH")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every resume
    runs = [run for path in options.paths for run in find_runs(path, None)]
    for spec in options.runs:
        method, equals, path = spec.partition("=")
        if not (method and equals and path):
            fail(f"--runs {spec}: must be METHOD=PATH")
        runs += find_runs(path, method.strip())
    spelling: dict[str, str] = {}
    for run in runs:
        run.game = spelling.setdefault(game_key(run.game), run.game)
    check_runs(runs)
    options.window = default_window(runs) if options.window is None else options.window
    if not any(len(grid_of([run], options.window)) for run in runs):
        fail(f"--window {options.window}: longer than every run")
    for run in runs:
        if not len(grid_of([run], options.window)):
            warn(f"{run.source} is left out: shorter than the window of {options.window:,} steps")
    games = sorted({run.game for run in runs})
    methods = list(dict.fromkeys(run.method for run in runs))
    references = read_references(options, games)

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same picture is the same file
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for game, metric in itertools.product(games, METRICS):
            path = options.output / f"{game}_{metric}"
            if draw(path, game, metric, runs, references, methods, options):
                print(f"{path}.png, .svg")
        table = table_rows(runs, games, options)
        table.to_csv(options.output / "table.csv", index=False, float_format="%.6g")
        (options.output / "table.md").write_text(text := markdown(table, options))
        curve_rows(runs, options.window).to_csv(options.output / "curves.csv", index=False, float_format="%.6g")
    except OSError as error:
        fail(f"cannot write to {options.output}: {error.strerror}")
    print(f"{options.output}/table.md, table.csv, curves.csv\n\n{text}")


if __name__ == "__main__":
    main()
