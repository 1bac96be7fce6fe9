"""benchmark/curves.py on real runs, and on event files of TensorBoard's own writer with known numbers."""

import os
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
from running import error_of, trained_run
from scipy.stats import bootstrap
from torch.utils.tensorboard import SummaryWriter

BATCH = 4 * 64  # agent steps of an iteration of `trained_run`
error_of = partial(error_of, curves.main)


def write_run(
    folder: Path, seed: int = 1, env_id: str = "ALE/Venture-v5", scores: dict[int, float] | None = None, **args
) -> Path:
    """An event file as the scripts write it: scores {step: value}; rooms are 1, the intrinsic reward is 0.5."""
    rows = "".join(f"\n|{key}|{value}|" for key, value in ({"env_id": env_id, "seed": seed} | args).items())
    with SummaryWriter(str(folder), purge_step=1) as writer:
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|{rows}")
        for step, score in (scores or {100: 1.0, 200: 2.0}).items():
            writer.add_scalar("charts/episodic_return", score, step)
            writer.add_scalar("charts/explored_rooms", 1, step)
            writer.add_scalar("charts/intrinsic_reward", 0.5, step)
    return folder


def test_real_runs_become_figures_a_table_and_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = trained_run("ppo_snd_atari", "Breakout", 5)
    curves.main([str(run.parents[1]), "--output", str(tmp_path), "--window", str(BATCH), "--at", "1e3", "1e6"])
    for metric in ("score", "intrinsic_reward"):
        assert image.imread(tmp_path / f"Breakout_{metric}.png").std() > 0.01
        assert "agent steps" in (tmp_path / f"Breakout_{metric}.svg").read_text()
    assert not (tmp_path / "Breakout_explored_rooms.png").exists()  # Breakout has no rooms
    table = pd.read_csv(tmp_path / "curves.csv")
    assert table["agent_steps"].tolist() == [BATCH * (i + 1) for i in range(5)]
    assert set(table["method"]) == {"ppo_snd_atari"}
    assert (table["intrinsic_reward"] > 0).all() and table["score"].dropna().between(0, 100).all()
    assert "ppo_snd_atari" in capsys.readouterr().out


def test_what_a_resumed_run_did_twice_counts_once(tmp_path: Path):
    write_run(tmp_path / "run", scores={100: 1.0, 200: 2.0, 300: 3.0})
    with SummaryWriter(str(tmp_path / "run"), purge_step=101, filename_suffix=".resumed") as writer:  # killed after 100
        for step, score in {200: 20.0, 300: 30.0, 400: 40.0}.items():
            writer.add_scalar("charts/episodic_return", score, step)
            writer.add_scalar("charts/intrinsic_reward", 0.5, step)
    run = curves.read_events(tmp_path / "run", None)
    assert run.series["score"][0].tolist() == [100, 200, 300, 400]
    assert run.series["score"][1].tolist() == [1, 20, 30, 40]


def test_a_point_is_the_mean_of_its_window():
    steps, values = np.array([100, 200, 300, 500]), np.array([1.0, 2.0, 6.0, 8.0])
    means = curves.window_means(steps, values, np.array([100, 200, 300, 400, 500]), 200)
    assert means.tolist() == [1.0, 1.5, 4.0, 6.0, 8.0]
    assert np.isnan(curves.window_means(steps, values, np.array([400]), 100)).all()  # (300, 400] holds nothing


def test_a_table_never_shows_a_maximum_nor_a_step_that_was_not_reached(tmp_path: Path):
    steps = range(100, 1001, 100)
    write_run(tmp_path / "a/seed_1", seed=1, scores={step: 900.0 if step == 300 else 10.0 for step in steps})
    write_run(tmp_path / "a/seed_2", seed=2, scores={step: 20.0 for step in steps if step <= 500})
    arguments = ["--window", "200", "--at", "400", "1000", "1200", "--output", str(tmp_path / "out")]
    curves.main([str(tmp_path), *arguments])
    table = pd.read_csv(tmp_path / "out/table.csv").query("metric == 'score'")
    assert table["seeds"].tolist() == [2, 1, 0]
    assert table["value"].tolist()[:2] == [(455 + 20) / 2, 10] and np.isnan(table["value"].iloc[2])
    assert "| a | 238 [20, 455] (2) | 10 (1) |  |" in (tmp_path / "out/table.md").read_text()


def test_statistic_and_rooms_reach_the_table(tmp_path: Path):
    for seed, score in enumerate((0.0, 10.0, 20.0, 1000.0)):
        write_run(tmp_path / f"a/{seed}", seed=seed, scores={100: score, 200: score})
    curves.main(
        [str(tmp_path), "--statistic", "iqm", "--at", "200", "--window", "100", "--output", str(tmp_path / "1")]
    )
    table = pd.read_csv(tmp_path / "1/table.csv")
    assert table[["metric", "value"]].to_numpy().tolist() == [["score", 15], ["explored_rooms", 1]]
    assert "interquartile mean" in (tmp_path / "1/table.md").read_text()


def test_a_long_run_is_read_whole(tmp_path: Path):
    steps = list(range(1, 10_102))  # TensorBoard's own reader keeps 10,000
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n|env_id|ALE/Pitfall-v5|\n|seed|1|")
        for step in steps:
            writer.add_scalar("charts/intrinsic_reward", 0.5, step)
    assert curves.read_events(tmp_path, None).series["intrinsic_reward"][0].tolist() == steps


def test_a_figure_shows_the_statistic_and_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for seed, score in ((1, 10.0), (2, 20.0), (3, 60.0)):
        write_run(tmp_path / f"a/Venture/{seed}", seed=seed, scores=dict.fromkeys((100, 200, 400, 500), score))
    for game in ("Venture", "Pitfall"):
        write_run(tmp_path / f"b/{game}/1", env_id=f"{game}-v5")
    (tmp_path / "c.csv").write_text("game,method,seed,agent_steps,score\nventure,r,1,100,7\nventure,r,1,300,9\n")
    figures, arguments = [], ["--window", "100", "--reference", str(tmp_path / "c.csv")]
    with monkeypatch.context() as patch:
        patch.setattr(curves.plt, "close", figures.append)
        curves.main([str(tmp_path), *arguments, "--output", str(tmp_path / "out")])
    drawn = {figure.axes[0].get_title() + figure.axes[0].get_ylabel(): figure.axes[0] for figure in figures}
    venture, pitfall = (drawn[f"{game}score of a game"] for game in ("Venture", "Pitfall"))
    reference, a, b = venture.lines
    np.testing.assert_array_equal(reference.get_xydata().T, [[100, 200, 300, 400, 500], [7, 8, 9, np.nan, np.nan]])
    assert a.get_xydata().tolist() == [[step, 30] for step in (100, 200, 300, 400, 500)]  # 300 is bridged
    low, high = venture.collections[0].get_datalim(venture.transData).intervaly
    assert [low, high] == pytest.approx([10, 60], abs=1)  # of 27 equally likely draws one is three times the least
    assert b.get_color() == pitfall.lines[0].get_color() != a.get_color()
    curves.plt.close("all")


def test_intervals_agree_with_another_bootstrap():
    seeds = np.random.default_rng(0).normal(100, 10, (10, 1))
    value, low, high, count = curves.aggregate(seeds, "mean")
    expected = bootstrap((seeds[:, 0],), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert count == 10 and value == pytest.approx(seeds.mean())
    assert [low[0], high[0]] == pytest.approx(list(expected), abs=0.8)
    assert curves.aggregate(seeds, "iqm")[0][0] == pytest.approx(np.sort(seeds[:, 0])[2:8].mean())


def test_exported_curves_are_read_again(tmp_path: Path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a/seed_{seed}", seed=seed, scores={step: seed * step for step in range(100, 1001, 50)})
    curves.main([str(tmp_path / "a"), "--window", "200", "--at", "600", "--output", str(tmp_path / "1")])
    again = ["--runs", f"a={tmp_path}/1/curves.csv", "--window", "200", "--at", "600", "--output", str(tmp_path / "2")]
    curves.main(again)
    assert (tmp_path / "1/table.csv").read_text() == (tmp_path / "2/table.csv").read_text()
    assert (tmp_path / "1/curves.csv").read_text() == (tmp_path / "2/curves.csv").read_text()


@pytest.mark.parametrize("game", ["Montezuma", "Breakout"])
def test_the_results_page_shows_what_its_raw_curves_hold(game: str, tmp_path: Path):
    """Its commands, run by a shell, give the rows of its tables."""
    page = (ROOT / "benchmark/RESULTS.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    (command,) = [
        line for line in lines if re.match(rf"python benchmark/curves.py +benchmark/results/{game}", line, re.I)
    ]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"{command} --output {tmp_path}"], cwd=ROOT, env=environment, check=True)
    score = (tmp_path / "table.md").read_text().split("score**")[1].split("**")[0]
    rows = [line for line in score.splitlines() if line.startswith("| ") and not line.startswith("| method")]
    assert len(rows) == {"Montezuma": 2, "Breakout": 7}[game]
    assert [row for row in rows if row not in page.splitlines()] == []


def test_a_csv_of_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [f"Venture,{method},1,{step},{step}" for method in ("a", "b") for step in (100, 200)]
    (tmp_path / "c.csv").write_text("\n".join(["game,method,seed,agent_steps,score", *rows]))
    (one,) = curves.read_csv(tmp_path / "c.csv", "b")
    assert one.method == "b" and one.series["score"][1].tolist() == [100, 200]
    assert "none is c: a, b" in error_of(capsys, "--runs", f"c={tmp_path}/c.csv")
    (tmp_path / "c.csv").write_text("\n".join(["game,method,seed,agent_steps,score", *rows[:2]]))
    assert [run.method for run in curves.read_csv(tmp_path / "c.csv", "c")] == ["c"]


def test_gaps_are_bridged_but_not_continued():
    filled = curves.fill_gaps(np.array([[np.nan, 1, np.nan, 3, np.nan]]))
    np.testing.assert_array_equal(filled, [[np.nan, 1, 2, 3, np.nan]])


@pytest.mark.parametrize(
    ("last", "spacing", "window"), [(128_000_000, 16_384, 10**6), (970_000, 4096, 20_000), (64, 32, 40)]
)
def test_default_window(last: int, spacing: int, window: int):
    assert curves.default_window([curves.Run("Venture", "a", 1, Path(), {}, last, spacing)]) == window


def test_a_reference_lies_under_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "a/seed_1", env_id="VentureNoFrameskip-v4", scores={100: 1.0, 200: 2.0, 300: 3.0})
    rows = [f"venture,method_{i},0,{step},5.0," for i in range(7) for step in (0, 100, 200, 300)]
    reference = tmp_path / "others.csv"
    reference.write_text("\n".join(["game,method,seed,agent_steps,score,explored_rooms", *rows]))
    arguments = [str(tmp_path / "a"), "--output", str(tmp_path / "out"), "--reference", str(reference)]
    assert "7 methods of Venture" in error_of(capsys, *arguments)
    assert "no method nobody" in error_of(capsys, *arguments, "--reference-methods", "nobody")
    assert not (tmp_path / "out").exists()
    curves.plt.rcParams["svg.fonttype"] = "none"  # text as text
    curves.main([*arguments, "--reference-methods", "method_0"])
    assert "reference: method_0 (1 seed)" in (tmp_path / "out/Venture_score.svg").read_text()


@pytest.mark.parametrize(
    ("folder", "method"),
    [
        ("runs/ppo_snd_c4/Venture/seed_3", "ppo_snd_c4"),
        ("runs/Venture/ppo_snd_c4/3", "ppo_snd_c4"),
        ("runs/ppo_snd_c4_seed_3", "ppo_snd_c4"),
        ("runs/Venture__ppo_snd_atari__3__1700000000", "ppo_snd_atari"),
    ],
)
def test_a_folder_tells_the_method(folder: str, method: str):
    assert curves.method_of(Path(folder), "Venture") == method


def test_a_half_written_file_keeps_its_whole_records(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "run", scores={100: 1.0, 200: 2.0, 300: 3.0})
    file = next(folder.iterdir())
    os.truncate(file, file.stat().st_size - 5)
    assert curves.read_events(folder, None).series["score"][0].tolist() == [100, 200, 300]
    assert capsys.readouterr().err.count("half-written or damaged") == 1
    os.truncate(file, 60)
    assert "is half-written" in error_of(capsys, folder)


def test_a_damaged_file_keeps_its_records_before_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "run", scores={step: float(step) for step in range(100, 1100, 100)})
    file = next(folder.iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)
    steps = curves.read_events(folder, None).series["score"][0].tolist()
    assert 2 <= len(steps) < 10 and steps == list(range(100, 100 * len(steps) + 1, 100))
    assert capsys.readouterr().err.count("half-written or damaged") == 1


def test_bad_input_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    assert "no runs found" in error_of(capsys, tmp_path / "empty")
    assert "no runs found" in error_of(capsys, "--runs", f"SND={tmp_path}/nothing/*")
    assert "METHOD=PATH" in error_of(capsys, "--runs", tmp_path)
    assert "no runs given" in error_of(capsys)
    assert "inf is no number of agent steps" in error_of(capsys, tmp_path, "--window", "inf")

    with SummaryWriter(str(tmp_path / "foreign")) as writer:
        writer.add_scalar("loss", 1.0, 1)
    assert "hyperparameters/text_summary" in error_of(capsys, tmp_path / "foreign")

    with SummaryWriter(str(tmp_path / "young")) as writer:
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n|env_id|ALE/Pitfall-v5|\n|seed|1|")
    assert "no charts/intrinsic_reward" in error_of(capsys, tmp_path / "young")

    write_run(tmp_path / "mixed")
    with SummaryWriter(str(tmp_path / "mixed"), filename_suffix=".other") as writer:
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n|env_id|ALE/Pitfall-v5|\n|seed|1|")
    assert "several games" in error_of(capsys, tmp_path / "mixed")

    write_run(tmp_path / "twice/x/seed_1")
    write_run(tmp_path / "twice/x/1")
    assert "twice" in error_of(capsys, tmp_path / "twice")
    (tmp_path / "other.csv").write_text("game,method,seed,agent_steps,score\nventure,x,1,100,3\nventure,x,1,200,3\n")
    assert "twice" in error_of(capsys, "--runs", f"x={tmp_path}/twice/x/1", f"x={tmp_path}/other.csv")

    write_run(tmp_path / "differ/x/seed_1", seed=1, model="A")
    write_run(tmp_path / "differ/x/seed_2", seed=2, model="C")
    assert "differ in model" in error_of(capsys, tmp_path / "differ")

    (tmp_path / "bad.csv").write_text("game,method,seed,agent_steps,score\nVenture,x,1,-1,2\n")
    assert "agent_steps must be at least 0" in error_of(capsys, tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("game,method\nVenture,x\n")
    assert "no column seed, agent_steps" in error_of(capsys, tmp_path / "bad.csv")
