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
from running import error_of, trained_run
from scipy.stats import bootstrap
from torch.utils.tensorboard import SummaryWriter

BATCH = 4 * 64  # agent steps of an iteration of `trained_run`
error_of = partial(error_of, curves.main)


def write_run(folder: Path, scores: dict[int, float] | None = None, resumed_at: int = 0, **args: object) -> Path:
    """An event file as the scripts write it: scores {step: value}; rooms are 1, the intrinsic reward is 0.5."""
    args = {"env_id": "ALE/Venture-v5", "seed": 1} | args
    rows = "".join(f"\n|{key}|{value}|" for key, value in args.items())
    with SummaryWriter(str(folder), purge_step=resumed_at + 1, filename_suffix=f".{resumed_at}") as writer:
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|{rows}", resumed_at)
        for step, score in ({100: 1.0, 200: 2.0} if scores is None else scores).items():
            writer.add_scalar("charts/episodic_return", score, step)
            writer.add_scalar("charts/explored_rooms", 1, step)
            writer.add_scalar("charts/intrinsic_reward", 0.5, step)
    return folder


def test_real_runs_become_figures_a_table_and_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = trained_run("ppo_snd_atari", "Breakout", 5)
    curves.main([str(run.parents[1]), "--output", str(tmp_path), "--window", str(BATCH), "--at", "1e3", "1e6"])
    for metric in ("score", "intrinsic_reward"):
        assert image.imread(tmp_path / f"Breakout_{metric}.png").std() > 0.01
        assert (tmp_path / f"Breakout_{metric}.svg").exists()
    assert not (tmp_path / "Breakout_explored_rooms.png").exists()  # Breakout has no rooms
    table = pd.read_csv(tmp_path / "curves.csv")
    assert table["agent_steps"].tolist() == [BATCH * (i + 1) for i in range(5)]
    assert set(table["method"]) == {"ppo_snd_atari"} and (table["intrinsic_reward"] > 0).all()
    assert "| ppo_snd_atari |" in capsys.readouterr().out


def test_what_a_resumed_run_did_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path, {100: 1.0, 200: 2.0, 300: 3.0}, gamma=0.99)
    write_run(tmp_path, {200: 20.0, 300: 30.0, 400: 40.0}, resumed_at=100, gamma=0.9)
    run = curves.read_events(tmp_path, None)
    assert [series.tolist() for series in run.series["score"]] == [[100, 200, 300, 400], [1, 20, 30, 40]]
    assert "resumed with another gamma" in capsys.readouterr().err


def test_a_point_is_the_mean_of_its_window():
    steps, values = np.array([100, 200, 300, 500]), np.array([1.0, 2.0, 6.0, 8.0])
    means = curves.window_means(steps, values, np.array([100, 200, 300, 400, 500]), 200)
    assert means.tolist() == [1.0, 1.5, 4.0, 6.0, 8.0]
    assert np.isnan(curves.window_means(steps, values, np.array([400]), 100)).all()  # (300, 400] holds nothing


def test_a_table_never_shows_a_maximum_nor_a_step_that_was_not_reached(tmp_path: Path):
    steps = range(100, 1001, 100)
    write_run(tmp_path / "a/seed_1", {step: 900.0 if step == 300 else 10.0 for step in steps})
    write_run(tmp_path / "a/seed_2", {step: 20.0 for step in steps if step <= 500}, seed=2)
    arguments = ["--window", "200", "--at", "400", "1000", "1200", "--output", str(tmp_path / "out")]
    curves.main([str(tmp_path), *arguments])
    table = pd.read_csv(tmp_path / "out/table.csv").query("metric == 'score'")
    assert table["seeds"].tolist() == [2, 1, 0]
    assert table["value"].tolist()[:2] == [(455 + 20) / 2, 10] and np.isnan(table["value"].iloc[2])
    assert "| a | 238 [20, 455] (2) | 10 (1) |  |" in (tmp_path / "out/table.md").read_text()


def test_a_long_run_is_read_whole(tmp_path: Path):
    steps = list(range(1, 10_102))  # TensorBoard's own reader keeps 10,000
    write_run(tmp_path, dict.fromkeys(steps, 1.0))
    assert curves.read_events(tmp_path, None).series["intrinsic_reward"][0].tolist() == steps


def test_a_figure_shows_the_statistic_and_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for seed, score in ((1, 10.0), (2, 20.0), (3, 60.0)):
        write_run(tmp_path / f"a/Venture/{seed}", dict.fromkeys((100, 200, 400, 500), score), seed=seed)
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
    assert reference.get_label() == "reference: r (1 seed)"
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


def test_statistic_and_rooms_reach_the_table_and_exported_curves_are_read_again(tmp_path: Path):
    for seed in (1, 2, 3, 50):
        write_run(tmp_path / f"a/seed_{seed}", {step: seed * step for step in range(100, 1001, 50)}, seed=seed)
    for source, output in (("a", "1"), ("1/curves.csv", "2")):
        arguments = ["--window", "200", "--at", "600", "--statistic", "iqm", "--output", str(tmp_path / output)]
        curves.main(["--runs", f"a={tmp_path}/{source}", *arguments])
    table = pd.read_csv(tmp_path / "1/table.csv")
    assert table[["metric", "value"]].to_numpy().tolist() == [["score", 2.5 * 525], ["explored_rooms", 1]]
    assert "interquartile mean" in (tmp_path / "1/table.md").read_text()
    for name in ("table.csv", "curves.csv"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text()


@pytest.mark.parametrize(("game", "methods"), [("Montezuma", 2), ("Breakout", 7)])
def test_the_results_page_shows_what_its_raw_curves_hold(game: str, methods: int, tmp_path: Path):
    """Its commands, run by a shell, give the rows of its tables."""
    page = (ROOT / "benchmark/RESULTS.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    pattern = rf"python benchmark/curves.py +benchmark/results/{game}"
    (command,) = [line for line in lines if re.match(pattern, line, re.I)]
    command = f"PATH={Path(sys.executable).parent}:$PATH; {command} --output {tmp_path}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    score = (tmp_path / "table.md").read_text().split("score**")[1].split("**")[0]
    rows = [line for line in score.splitlines() if line.startswith("| ") and not line.startswith("| method")]
    assert len(rows) == methods
    assert [row for row in rows if row not in page.splitlines()] == []


def test_a_csv_of_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [f"Venture,method_{i},1,{step},{step}" for i in range(7) for step in (100, 200)]
    (tmp_path / "c.csv").write_text("\n".join(["game,method,seed,agent_steps,score", *rows]))
    (one,) = curves.read_csv(tmp_path / "c.csv", "method_1")
    assert one.method == "method_1" and one.series["score"][1].tolist() == [100, 200]
    assert "none is c: method_0, method_1" in error_of(capsys, "--runs", f"c={tmp_path}/c.csv")
    arguments = [write_run(tmp_path / "a"), "--output", tmp_path / "out", "--reference", tmp_path / "c.csv"]
    assert "7 methods of Venture" in error_of(capsys, *arguments)
    assert "no method nobody" in error_of(capsys, *arguments, "--reference-methods", "nobody")
    assert not (tmp_path / "out").exists()
    (tmp_path / "c.csv").write_text("\n".join(["game,method,seed,agent_steps,score", *rows[:2]]))
    assert [run.method for run in curves.read_csv(tmp_path / "c.csv", "c")] == ["c"]


def test_default_window():
    for last, spacing, window in [(128_000_000, 16_384, 10**6), (970_000, 4096, 20_000), (64, 32, 40)]:
        assert curves.default_window([curves.Run("Venture", "a", 1, Path(), {}, last, spacing)]) == window


def test_a_folder_tells_the_method():
    for folder in ("ppo_snd_c4/Venture/seed_3", "Venture/ppo_snd_c4/3", "ppo_snd_c4_seed_3"):
        assert curves.method_of(Path("runs", folder), "Venture") == "ppo_snd_c4"
    assert curves.method_of(Path("runs/Venture__ppo_snd_atari__3__1700000000"), "Venture") == "ppo_snd_atari"


def test_a_damaged_file_keeps_its_records_before_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture):
    scores = {step: float(step) for step in range(100, 1100, 100)}
    (file,) = write_run(tmp_path, scores).iterdir()
    content = file.read_bytes()
    middle = len(content) * 2 // 3
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged, most in ((flipped, 9), (content[:-5], 10)):  # of the last step only the intrinsic reward is cut off
        file.write_bytes(damaged)
        steps = curves.read_events(tmp_path, None).series["score"][0].tolist()
        assert 2 <= len(steps) <= most and steps == list(scores)[: len(steps)]
        assert capsys.readouterr().err.count("half-written or damaged") == 1
    file.write_bytes(content[:60])
    assert "is half-written" in error_of(capsys, tmp_path)


def test_bad_input_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    refused = partial(error_of, capsys)
    (tmp_path / "empty").mkdir()
    assert "no runs found" in refused(tmp_path / "empty")
    assert "no runs found" in refused("--runs", f"SND={tmp_path}/nothing/*")
    assert "METHOD=PATH" in refused("--runs", tmp_path)
    assert "no runs given" in refused()
    assert "inf is no number of agent steps" in refused(tmp_path, "--window", "inf")
    with SummaryWriter(str(tmp_path / "foreign")) as writer:
        writer.add_scalar("loss", 1.0, 1)
    assert "hyperparameters/text_summary" in refused(tmp_path / "foreign")
    assert "no charts/intrinsic_reward" in refused(write_run(tmp_path / "young", {}))

    write_run(tmp_path / "mixed")
    write_run(tmp_path / "mixed", env_id="ALE/Pitfall-v5", resumed_at=100)
    assert "several games" in refused(tmp_path / "mixed")

    write_run(tmp_path / "twice/x/seed_1")
    (tmp_path / "other.csv").write_text("game,method,seed,agent_steps,score\nventure,x,1,100,3\nventure,x,1,200,3\n")
    assert "twice" in refused(tmp_path / "twice", "--runs", f"x={tmp_path}/other.csv")

    for seed, model in ((1, "A"), (2, "C")):
        write_run(tmp_path / f"differ/x/seed_{seed}", seed=seed, model=model)
    assert "differ in model" in refused(tmp_path / "differ")

    (tmp_path / "bad.csv").write_text("game,method,seed,agent_steps,score\nVenture,x,1,-1,2\n")
    assert "agent_steps must be at least 0" in refused(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("game,method\nVenture,x\n")
    assert "no column seed, agent_steps" in refused(tmp_path / "bad.csv")
