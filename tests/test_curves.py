"""benchmark/curves.py on real runs, and on event files of TensorBoard's own writer with known numbers."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import curves
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib import image
from matplotlib import pyplot as plt
from running import error_of, trained_run
from scipy.stats import bootstrap
from torch.utils.tensorboard import SummaryWriter

BATCH = 4 * 64  # agent steps of an iteration of `trained_run`
error_of = partial(error_of, curves.main)
pytestmark = pytest.mark.usefixtures("folder")


def draw(*arguments: object) -> None:
    """Run the program."""
    curves.main([*map(str, arguments)])


def write_csv(*rows: str, name: str = "c.csv") -> Path:
    """Curves as a CSV of scores."""
    path = Path(name)
    path.write_text("\n".join(["game,method,seed,agent_steps,score", *rows]))
    return path


def write_run(folder: str, scores: dict[int, float] | None = None, resumed_at: int = 0, **args: object) -> Path:
    """An event file as the scripts write it: scores {step: value}; rooms are 1, the intrinsic reward is 0.5."""
    args = {"env_id": "ALE/Venture-v5", "seed": 1} | args
    rows = "".join(f"\n|{key}|{value}|" for key, value in args.items())
    with SummaryWriter(folder, purge_step=resumed_at + 1, filename_suffix=f".{resumed_at}") as writer:
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|{rows}", resumed_at)
        for step, score in ({100: 1.0, 200: 2.0} if scores is None else scores).items():
            writer.add_scalar("charts/episodic_return", score, step)
            writer.add_scalar("charts/explored_rooms", 1, step)
            writer.add_scalar("charts/intrinsic_reward", 0.5, step)
    return Path(folder)


def test_real_runs_become_figures_a_table_and_a_csv(capsys: pytest.CaptureFixture):
    run = trained_run("ppo_snd_atari", "Breakout", 5)
    draw(run.parents[1], "--window", BATCH, "--at", "1e3", "1e6")
    for metric in ("score", "intrinsic_reward"):
        assert image.imread(f"curves/Breakout_{metric}.png").std() > 0.01
        assert Path(f"curves/Breakout_{metric}.svg").exists()
    assert not Path("curves/Breakout_explored_rooms.png").exists()  # Breakout has no rooms
    table = pd.read_csv("curves/curves.csv")
    assert table["agent_steps"].tolist() == [BATCH * (i + 1) for i in range(5)]
    assert set(table["method"]) == {"ppo_snd_atari"} and (table["intrinsic_reward"] > 0).all()
    assert "| ppo_snd_atari |" in capsys.readouterr().out


def test_what_a_resumed_run_did_twice_counts_once(capsys: pytest.CaptureFixture):
    write_run("a", {100: 1.0, 200: 2.0, 300: 3.0}, gamma=0.99)
    run = write_run("a", {200: 20.0, 300: 30.0, 400: 40.0}, resumed_at=100, gamma=0.9)
    run = curves.read_events(run)
    assert run.log["score"].to_dict() == {100: 1, 200: 20, 300: 30, 400: 40}
    assert "resumed with another gamma" in capsys.readouterr().err


def test_a_point_is_the_mean_of_its_window():
    log = pd.DataFrame({"score": {100: 1.0, 200: 2.0, 300: 6.0, 500: 8.0}})
    run = curves.Run("Venture", "a", 1, Path(), log)
    means = partial(curves.window_means, [run])
    assert means(200, [100, 200, 300, 400, 500, 600])["score"].tolist() == [1.0, 1.5, 4.0, 6.0, 8.0]  # 600: not reached
    assert means(100)["agent_steps"].tolist() == [100, 200, 300, 400, 500]
    assert np.isnan(means(100)["score"].iloc[3])  # (300, 400] holds nothing


@pytest.mark.filterwarnings("error::FutureWarning")  # pandas is about to treat empty tables otherwise
def test_a_table_never_shows_a_maximum_nor_a_step_that_was_not_reached():
    steps = range(100, 1001, 100)
    write_run("a/seed_1", {step: 900.0 if step == 300 else 10.0 for step in steps})
    write_run("a/seed_2", {step: 20.0 for step in steps if step <= 500}, seed=2)
    write_run("b/seed_1", {step: 5.0 for step in steps if step <= 500})
    write_run("c/seed_1")  # ends before the first of them
    draw("a", "b", "c", "--window", 200, "--at", 400, 1000, 1200)
    table = pd.read_csv("curves/table.csv").query("metric == 'score'")
    assert table[["seeds", "value"]].to_numpy().tolist() == [[2, (455 + 20) / 2], [1, 10], [1, 5]]
    lines = Path("curves/table.md").read_text().splitlines()
    assert {"| a | 238 [20, 455] (2) | 10 (1) |", "| b | 5 (1) |  |"} <= set(lines)


def test_a_long_run_is_read_whole():
    run = write_run("a", dict.fromkeys(range(1, 10_102), 1.0))  # TensorBoard's own reader keeps 10,000
    assert curves.read_events(run).log.index.tolist() == [*range(1, 10_102)]


def figures_of(*arguments: object) -> dict[str, plt.Figure]:
    """The figures by game, for the score."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", figures.append)
        draw(*arguments)
    plt.close("all")
    drawn = [(figure, figure.axes[0]) for figure in figures]
    return {axes.get_title(): figure for figure, axes in drawn if axes.get_ylabel() == "score of a game"}


def labelled(figure: plt.Figure) -> dict[str, plt.Line2D]:
    """The lines in a figure's legend."""
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def test_a_figure_shows_the_statistic_and_its_interval():
    for seed, score in ((1, 10.0), (2, 20.0), (3, 60.0)):
        write_run(f"a/Venture/{seed}", dict.fromkeys((100, 200, 400, 500), score), seed=seed)
    for game in ("Venture", "Pitfall"):
        write_run(f"b/{game}/1", env_id=f"{game}-v5")
    theirs = ["ventureRevenge,s,1,100,1", "venture,r,1,100,7", "venture,r,1,300,9", "venture,r,1,700,13"]
    figures = figures_of("a", "b", "--window", 100, "--reference", write_csv(*theirs))
    lines = labelled(figures["Venture"])
    assert list(lines) == ["author's r (1 seed)", "a (3 seeds)", "b (1 seed)"]
    r, a, b = lines.values()
    assert r.get_xydata().tolist() == [[100, 7], [200, 8], [300, 9], [400, 10], [500, 11]]  # grey: no hue
    assert 0 < float(r.get_color()) < 1
    assert a.get_xydata().tolist() == [[step, 30] for step in (100, 200, 300, 400, 500)]  # 300 is bridged
    _, band, _ = figures["Venture"].axes[0].collections
    low, high = band.get_datalim(figures["Venture"].axes[0].transData).intervaly
    assert [low, high] == pytest.approx([10, 60], abs=1)  # of 27 equally likely draws one is three times the least
    (b_alone,) = labelled(figures["Pitfall"]).values()
    assert b.get_color() == b_alone.get_color() != a.get_color()
    titles = [figure.legends[0].get_title().get_text() for figure in figures.values()]
    assert sorted(titles) == ["", "mean over seeds, band: 95 % bootstrap interval"]  # one seed has neither


@pytest.mark.parametrize("end", [400, 600])
def test_a_line_has_no_kink_where_a_seed_ends(end: int):
    """The other goes on as a thin line, if by more than one window."""
    for seed, last in ((1, 300), (2, end)):
        write_run(f"a/{seed}", dict.fromkeys(range(100, last + 1, 100), 10.0 * seed), seed=seed)
    (figure,) = figures_of("a", "--window", 100).values()
    (mean,) = labelled(figure).values()
    assert mean.get_xydata().tolist() == [[step, 15] for step in (100, 200, 300)]
    alone = [line.get_xydata() for line in figure.axes[0].lines if line is not mean]
    alone = [points[~np.isnan(points[:, 1])].tolist() for points in alone]
    assert alone == ([[[300, 10]], [[step, 20] for step in (300, 400, 500, 600)]] if end == 600 else [])
    assert {line.get_color() for line in figure.axes[0].lines} == {mean.get_color()}


def test_a_single_point_is_seen():
    (figure,) = figures_of(write_run("a", {100: 7.0})).values()
    (line,) = labelled(figure).values()
    assert line.get_xydata().tolist() == [[100, 7]] and line.get_marker() == "o"
    low, high = figure.axes[0].get_xlim()
    assert low < 80 and high > 120


def test_intervals_agree_with_another_bootstrap():
    seeds = np.random.default_rng(0).normal(100, 10, (10, 1))
    value, low, high = curves.aggregate(seeds, "mean")
    expected = bootstrap((seeds[:, 0],), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert value == pytest.approx(seeds.mean())
    assert [low[0], high[0]] == pytest.approx(list(expected), abs=0.8)
    assert curves.aggregate(seeds, "iqm")[0][0] == pytest.approx(np.sort(seeds[:, 0])[2:8].mean())


def test_statistic_and_rooms_reach_the_table_and_exported_curves_are_read_again():
    for seed in (1, 2, 3, 50):
        write_run(f"a/seed_{seed}", {step: seed * step for step in range(100, 1001, 50)}, seed=seed)
    for source, output in (("a", "1"), ("1/curves.csv", "2")):
        arguments = ["--window", 200, "--at", 600, "--statistic", "iqm", "--output", output]
        draw("--runs", f"a={source}", *arguments)
    table = pd.read_csv("1/table.csv")
    assert table[["metric", "value"]].to_numpy().tolist() == [["score", 2.5 * 525], ["explored_rooms", 1]]
    assert "interquartile mean" in Path("1/table.md").read_text()
    for name in ("table.csv", "curves.csv"):
        assert Path("1", name).read_text() == Path("2", name).read_text()


@pytest.mark.parametrize(("game", "methods"), [("Montezuma", 4), ("Breakout", 8), ("MsPacman", 1)])
def test_the_results_page_shows_what_its_raw_curves_hold(game: str, methods: int, tmp_path: Path):
    """Its commands, run by a shell, give the rows of its tables, blanks at their ends apart."""
    page = (ROOT / "benchmark/RESULTS.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    pattern = rf"python benchmark/curves.py +benchmark/results/{game}"
    rows = []
    for command in [line.partition("#")[0] for line in lines if re.match(pattern, line, re.I)]:
        command = f"PATH={Path(sys.executable).parent}:$PATH; {command} --output {tmp_path}"
        subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
        score = (tmp_path / "table.md").read_text().split("score**")[1].split("**")[0]
        rows += [line for line in score.splitlines() if line.startswith("| ") and not line.startswith("| method")]
    assert len(rows) == methods
    shown = [line.rstrip("| ") for line in page.splitlines()]  # a short run has no column for later steps
    assert [row for row in rows if row.rstrip("| ") not in shown] == []


def test_a_csv_of_several_methods(capsys: pytest.CaptureFixture):
    rows = [f"Venture,method_{i},1,{step},{step}" for i in range(7) for step in (100, 200)]
    (one,) = curves.read_csv(write_csv(*rows), "method_1")
    assert one.method == "method_1" and one.log["score"].to_dict() == {100: 100, 200: 200}
    assert "none is c: method_0, method_1" in error_of(capsys, "--runs", "c=c.csv")
    arguments = [write_run("a"), "--reference", "c.csv"]
    assert "no method nobody" in error_of(capsys, *arguments, "--reference-methods", "nobody")
    assert not Path("curves").exists()
    assert [run.method for run in curves.read_csv(write_csv(*rows[:2]), "c")] == ["c"]


@pytest.mark.parametrize(
    ("last", "spacing", "window", "steps"),
    [
        (128_000_000, 16_384, 10**6, [million * 10**6 for million in (1, 2, 5, 10, 20, 50, 100, 128)]),
        (970_000, 4096, 20_000, [20_000, 50_000, 100_000, 200_000, 500_000, 960_000]),
        (64, 32, 50, [50]),
    ],
)
def test_window_and_table_follow_the_length_of_the_runs(last: int, spacing: int, window: int, steps: list[int]):
    run = curves.Run("Venture", "a", 1, Path(), pd.DataFrame({"score": 0.0}, range(spacing, last + 1, spacing)))
    assert curves.default_window([run]) == window and curves.default_table_steps([run], window) == steps


def test_a_folder_tells_the_method():
    for folder in ("ppo_snd_c4/Venture/seed_3", "Venture/ppo_snd_c4/3", "ppo_snd_c4_seed_3"):
        assert curves.method_of(Path("runs", folder), "Venture") == "ppo_snd_c4"
    assert curves.method_of(Path("runs/Venture__ppo_snd_atari__3__1700000000"), "Venture") == "ppo_snd_atari"


def test_a_damaged_file_keeps_its_records_before_the_damage():
    scores = {step: float(step) for step in range(100, 1100, 100)}
    (file,) = write_run("a", scores).iterdir()
    content = file.read_bytes()
    (flipped := bytearray(content))[len(content) * 2 // 3] ^= 1
    for damaged, most in ((flipped, 9), (content[:-5], 10)):  # of the last step only the intrinsic reward is cut off
        file.write_bytes(damaged)
        steps = curves.read_events(file.parent).log.index.tolist()
        assert 2 <= len(steps) <= most and steps == list(scores)[: len(steps)]


def test_what_cannot_be_used_is_left_out_unless_nothing_is_left(capsys: pytest.CaptureFixture):
    (bad := Path("bad")).mkdir()
    with SummaryWriter(str(bad / "foreign")) as writer:
        writer.add_scalar("loss", 1.0, 1)
    write_run("bad/young", {})
    write_run("bad/other", env_id="Venture-ram-v4")
    (cut,) = write_run("bad/cut").iterdir()
    cut.write_bytes(cut.read_bytes()[:60])
    (bad / "noise").mkdir()
    (bad / "noise/events.out.tfevents.1").write_bytes(b"noise" * 100)
    (bad / "columns.csv").write_text("game,method\nVenture,x\n")
    write_csv("Venture,x,1,100,high", name="bad/words.csv")
    (bad / "nothing.csv").write_text("")
    arguments = [bad, *sorted(bad.glob("*.csv")), "--runs", "SND=nothing/*"]
    reasons = dict.fromkeys(["foreign", "cut", "noise"], "no hyperparameters/text_summary") | {
        "young": "it has logged nothing yet",
        "other": "unknown env_id Venture-ram-v4",
        "columns.csv": "no column seed, agent_steps; expected",
        "words.csv": "could not convert",
        "nothing.csv": "No columns",
        "nothing/*": "no runs found",
    }
    refusal = error_of(capsys, *arguments)
    assert "no usable run: " in refusal and all(reason in refusal for reason in reasons.values())
    assert not Path("curves").exists()
    draw(write_run("good/seed_1"), *arguments)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(reasons) and all("warning: left out: " in line for line in warnings)
    for name, reason in reasons.items():
        assert sum(f"{name}: " in line and reason in line for line in warnings) == 1, name
    assert set(pd.read_csv("curves/curves.csv")["method"]) == {"good"}


def test_bad_input_ends_with_one_line(capsys: pytest.CaptureFixture):
    refused = partial(error_of, capsys)
    assert "METHOD=PATH" in refused("--runs", "a")
    assert "name the runs" in refused()
    assert "inf is no number of agent steps" in refused("a", "--window", "inf")
    assert "shorter than the window of 1,000 steps" in refused(write_run("a"), "--window", "1e3")

    write_run("twice/x/seed_1")
    other = write_csv("venture,x,1,100,3", "venture,x,1,200,3")
    assert "again" in refused("twice", "--runs", f"x={other}")

    for seed, model in ((1, "A"), (2, "C")):
        write_run(f"differ/x/seed_{seed}", seed=seed, model=model)
    assert "differ in model" in refused("differ")
