"""Checkpoints, resume, the lock and files from elsewhere, on real runs."""

import copy
import importlib
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ENTROPY, RND, ROOT, SCRIPTS, SND, reward_and_estimate
from running import (
    BATCH,
    ENDLESS,
    TINY,
    assert_equal,
    assert_whole_curve,
    call_main,
    finish,
    flags,
    read_checkpoint,
    read_scalars,
    start,
    wait_for_checkpoint,
    wait_until,
)


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """A script and the folder above the runs/run that it trained for 2 iterations, then stopped, then resumed to 4."""
    script, folder = importlib.import_module(request.param), tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call_main(script, flags(2, "--norm-int-reward")) == 0
        assert call_main(script, ["--resume", "runs/run", "--total-timesteps", str(4 * BATCH)]) == 0
    return script, folder


@pytest.fixture
def unchanged(run: tuple[ModuleType, Path], monkeypatch: pytest.MonkeyPatch) -> object:
    """Work above the run's folder; afterwards its files must be as they were."""
    monkeypatch.chdir(run[1])
    before = {path: path.read_bytes() for path in Path("runs/run").iterdir()}
    yield
    assert {path: path.read_bytes() for path in Path("runs/run").iterdir()} == before


def one_line(capsys: pytest.CaptureFixture) -> str:
    """What was printed on standard error, which must be one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_resume_equals_an_uninterrupted_run(run: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping changes nothing but the episodes: with fresh environments at that point, all is equal bit for bit."""
    script, folder = run
    collect_rollout, iteration = script.collect_rollout, 0

    def collect(envs: object, *inputs: object) -> object:
        nonlocal iteration
        iteration += 1
        if iteration == 3:
            seed = int(np.random.SeedSequence([inputs[2].seed, 2]).generate_state(1)[0] >> 2)
            fresh = script.AtariEnvs(inputs[2], seed)
            fresh.rooms |= envs.rooms
            vars(envs).update(vars(fresh))
        return collect_rollout(envs, *inputs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "collect_rollout", collect)
    if script.__name__ == ENTROPY:  # the memory of an environment begins with its first episode
        rewards = script.state_entropy_rewards
        forget = lambda *given: rewards(*given[:2], None if iteration == 3 else given[2], *given[3:])  # noqa: E731
        monkeypatch.setattr(script, "state_entropy_rewards", forget)
    assert call_main(script, flags(4, "--norm-int-reward")) == 0

    assert_equal(read_checkpoint(tmp_path / "runs/run"), read_checkpoint(folder / "runs/run"))
    curves = [read_scalars(path / "runs/run") for path in (tmp_path, folder)]
    for curve in curves:
        del curve["charts/SPS"]
    assert curves[0] == curves[1]
    assert len({value for _, value in curves[0]["losses/distillation"]}) == 4
    assert_whole_curve(folder / "runs/run", 4)


def test_training_beside_the_next_rollout_changes_no_number(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is only finished before rewards and checkpoints; here 12 minibatches for 8 steps."""
    update, train_novelty, finish = script.update, script.train_novelty, script.finish

    def unfinished(*given: object) -> tuple:
        monkeypatch.setattr(script, "finish", lambda *_: None)
        result = update(*given)
        monkeypatch.setattr(script, "finish", finish)
        return result

    def on_copies(learner: object, args: object, losses: torch.Tensor, *rows: torch.Tensor) -> Iterator[None]:
        return train_novelty(learner, args, losses, *(x.clone() for x in rows))

    results = []
    for beside in (False, True):
        (tmp_path / str(beside)).mkdir()
        monkeypatch.chdir(tmp_path / str(beside))
        if beside:
            monkeypatch.setattr(script, "update", unfinished)
            monkeypatch.setattr(script, "train_novelty", on_copies)
        minibatches = ["--num-minibatches", "4", "--update-epochs", "3", "--checkpoint-interval", "2", "--bf16"]
        assert call_main(script, flags(4, "--norm-int-reward", *minibatches)) == 0
        results.append((read_checkpoint(Path("runs/run")), read_scalars(Path("runs/run"))))
        del results[-1][1]["charts/SPS"]
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_rooms_and_scores_go_on(run: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run counts on from the rooms and the last 100 scores of its checkpoint."""
    state = read_checkpoint(run[1] / "runs/run")
    state["counters"] |= {"rooms": [1, 7], "scores": [float(score) for score in range(150)]}
    monkeypatch.chdir(tmp_path)
    Path("runs/run").mkdir(parents=True)
    torch.save(state, "runs/run/checkpoint.pt")
    assert call_main(run[0], ["--resume", "runs/run", "--total-timesteps", str(5 * BATCH)]) == 0
    counters = read_checkpoint(Path("runs/run"))["counters"]
    assert counters == {"iteration": 5, "rooms": [1, 7], "scores": [float(score) for score in range(50, 150)]}
    assert read_scalars(Path("runs/run"))["charts/explored_rooms"] == [(5 * BATCH, 2)]


def test_main_trains_and_logs(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes of each rollout, step by step, with reset rows in it; and the means of the games that ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 5)
    collect_rollout, seen, games = script.collect_rollout, [], []

    def collect(envs: object, learner: object, *inputs: object) -> object:
        before = None if seen else copy.deepcopy(learner)
        assert not envs.returns and not envs.lengths
        rollout = collect_rollout(envs, learner, *inputs)
        envs.returns, envs.lengths = [*envs.returns, 30.0], [*envs.lengths, 35]  # a better game, too
        games.append((np.mean(envs.returns), np.mean(envs.lengths)))
        seen.append((before, copy.deepcopy(rollout), inputs[1], torch.get_rng_state()))
        return rollout

    monkeypatch.setattr(script, "collect_rollout", collect)
    assert call_main(script, flags(2)) == 0
    learner, buffer, scalars = seen[0][0], None, read_scalars(Path("runs/run"))
    for i, (_, rollout, args, random_state) in enumerate(seen):
        torch.set_rng_state(random_state)
        assert not rollout.valid.all()
        expected = {}
        if script.__name__ == ENTROPY:
            rewards, _ = script.state_entropy_rewards(learner, rollout, copy.deepcopy(buffer), args)
            expected["charts/entropy_reward"] = rewards[rollout.valid].mean().item()
        inputs, buffer = reward_and_estimate(script, learner, rollout, args, buffer)
        explained = script.explained_variance(rollout, *inputs[:2], args)
        rewards = script.intrinsic_rewards(learner, rollout, args)
        rewards = (rewards[0] if script.__name__ == RND else rewards)[rollout.valid]
        losses, _ = script.update(learner, rollout, *inputs, args)
        expected |= {f"losses/{name}": loss.item() for name, loss in losses.items()}
        expected |= {"losses/explained_variance": explained.item()}
        expected |= {"charts/intrinsic_reward": rewards.mean().item()}
        expected |= {"charts/intrinsic_reward_std": rewards.std(correction=0).item()}
        expected |= dict(zip(["charts/episodic_return", "charts/episodic_length"], games[i], strict=True))
        assert {tag: scalars[tag][i][1] for tag in expected} == pytest.approx(expected)
    state = {name: part.state_dict() for name, part in vars(learner).items()}
    assert_equal(state, read_checkpoint(Path("runs/run"))["learner"])


def test_checkpoint_is_complete(run: tuple) -> None:
    """It holds every network, optimiser, statistic, generator, counter and argument."""
    script, folder = run
    state = read_checkpoint(folder / "runs/run")
    networks = {"agent", "target", "predictor"} | ({"encoder"} if script.__name__ == ENTROPY else set())
    trained = networks - ({"target"} if script.__name__ == RND else set())
    optimizers = {"optimizer"} | {f"{name}_optimizer" for name in trained - {"agent"}}
    assert state["learner"].keys() == networks | optimizers | {"obs_stats", "int_returns"}
    assert state["counters"]["iteration"] == 4 and state["counters"]["rooms"] == [1]
    assert state["args"]["total_timesteps"] == 4 * BATCH and state["args"]["norm_int_reward"]
    assert state["random"].keys() == {"python", "numpy", "torch", "cuda"}
    for name in optimizers:
        assert {moments["step"].item() for moments in state["learner"][name]["state"].values()} == {4}
    frames = state["learner"]["obs_stats"]["count"].item()
    assert 4 * (2 + 4 * 8) - 8 <= frames <= 4 * (2 + 4 * 8)  # but for reset rows


def test_finished_run_says_so(run: tuple, unchanged: None, capsys: pytest.CaptureFixture) -> None:
    """Resuming it, even with the saved arguments spelt out, ends with status 0."""
    assert call_main(run[0], ["--resume", "runs/run", *TINY]) == 0
    printed = capsys.readouterr()
    assert "runs/run is finished: 128 steps" in printed.out and not printed.err


@pytest.mark.parametrize(
    "given",
    [
        ["--total-timesteps", "96"],
        ["--num-envs", "128"],  # these three are the defaults
        ["--num-steps", "128"],
        ["--cuda"],
        ["--model", "C"],
        ["--seed", "2"],
        ["--learning-rate", "0.0002"],
        ["--env-id", "BreakoutNoFrameskip-v4"],
        ["--env-backend", "gymnasium"],
        ["--episodic-life"],
        ["--update-proportion", "0.5"],
        ["--run-name", "other"],
        ["--checkpoint-interval", "7"],
    ],
    ids=lambda given: given[0],
)
def test_contradicting_argument_is_refused(
    run: tuple, unchanged: None, given: list[str], capsys: pytest.CaptureFixture
) -> None:
    """By its name, with the given and the saved value; also where it is the default."""
    assert call_main(run[0], ["--resume", "runs/run", *given]) == 2
    message = one_line(capsys)
    assert f"{given[0].replace('--cuda', '--cuda True')} " in message and "saved" in message
    assert all(value in message for value in given[1:])


def test_existing_run_name_is_refused(run: tuple, unchanged: None, capsys: pytest.CaptureFixture) -> None:
    """A new run never writes over an old one."""
    assert call_main(run[0], flags(2)) == 2
    assert "runs/run holds a run already" in one_line(capsys)


# What a hostile or unlucky file may be: each changes the state of a checkpoint, or its bytes.
Edit = Callable[[dict], object]
STATES: dict[str, Edit] = {
    "newer version": lambda state: state | {"version": state["version"] + 1},
    "another script's": lambda state: state | {"script": "ppo_other"},
    "a list": lambda state: [state["version"]],
    "a state_dict": lambda state: state["learner"]["agent"],
    "version is a tensor": lambda state: state | {"version": torch.zeros(2)},
    "script is a tensor": lambda state: state | {"script": torch.zeros(2)},
    "other arguments": lambda state: state | {"args": state["args"] | {"surprise": 1}},
    "argument of two lines": lambda state: state | {"args": state["args"] | {"sur\nprise": 1}},
    "argument out of range": lambda state: state | {"args": state["args"] | {"num_envs": -4}},
    "argument of another type": lambda state: state | {"args": state["args"] | {"num_steps": "8"}},
    "fractional environments": lambda state: state | {"args": state["args"] | {"num_envs": 4.5, "num_steps": 8.0}},
    "unknown model": lambda state: state | {"args": state["args"] | {"model": "Z"}},
    "unknown backend": lambda state: state | {"args": state["args"] | {"env_backend": "other"}},
    "another model's": lambda state: state | {"args": state["args"] | {"model": "C"}},
    "another game's": lambda state: state | {"args": state["args"] | {"env_id": "BreakoutNoFrameskip-v4"}},
    "negative iteration": lambda state: state | {"counters": state["counters"] | {"iteration": -3}},
    "fractional iteration": lambda state: state | {"counters": state["counters"] | {"iteration": 2.5}},
    "scores of text": lambda state: state | {"counters": state["counters"] | {"scores": ["1", "2"]}},
    "rooms of two types": lambda state: state | {"counters": state["counters"] | {"rooms": [1, "a"]}},
    "counters are a list": lambda state: state | {"counters": [1, 2, 3]},
    "no learner": lambda state: state | {"learner": {}},
    "learner is a number": lambda state: state | {"learner": 7},
    "no generators": lambda state: state | {"random": {}},
}


@pytest.fixture(scope="module")
def rnd_state(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The state of an RND run, for the files below: the script with the smallest checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("rnd"))
        assert call_main(importlib.import_module(RND), flags(1)) == 0
        return read_checkpoint(Path("runs/run"))


def assert_refused(path: Path, capsys: pytest.CaptureFixture) -> str:
    """Resuming from this file ends with status 2 and one line that names it; the file stays. Returns the line."""
    before = path.read_bytes()
    capsys.readouterr()
    arguments = ["--resume", str(path.parent), "--total-timesteps", str(2 * BATCH)]  # a file that is taken trains once
    assert call_main(importlib.import_module(RND), arguments) == 2
    assert path.read_bytes() == before
    assert set(path.parent.iterdir()) <= {path, path.parent / "lock"}
    message = one_line(capsys)
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("edit", STATES.values(), ids=STATES.keys())
def test_state_of_another_layout_is_refused(
    rnd_state: dict, edit: Edit, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A well-formed file with the wrong things in it."""
    path = tmp_path / "checkpoint.pt"
    torch.save(edit(dict(rnd_state)), path)
    assert_refused(path, capsys)


@pytest.mark.parametrize("setting", ["betas", "lr"])
def test_optimiser_without_its_settings_is_refused(
    rnd_state: dict, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """PyTorch itself would notice at the first step."""
    for value in (None, "x"):
        state = copy.deepcopy(rnd_state)
        group = state["learner"]["predictor_optimizer"]["param_groups"][0]
        if value is None:
            del group[setting]
        else:
            group[setting] = value
        torch.save(state, tmp_path / "checkpoint.pt")
        assert_refused(tmp_path / "checkpoint.pt", capsys)


def test_another_scripts_checkpoint_is_refused_by_name(
    run: tuple, unchanged: None, capsys: pytest.CaptureFixture
) -> None:
    """The line says which script reads it."""
    other = importlib.import_module(SND if run[0].__name__ == RND else RND)
    assert call_main(other, ["--resume", "runs/run"]) == 2
    assert run[0].__name__ in one_line(capsys)


@pytest.mark.parametrize("saved", [{"surprise": 1}, {"num_envs": 4.5}], ids=["unknown", "type"])
def test_other_arguments_are_refused_by_name(
    rnd_state: dict, saved: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As after a flag was added to a script."""
    torch.save(rnd_state | {"args": rnd_state["args"] | saved}, tmp_path / "checkpoint.pt")
    assert f"other arguments: {list(saved)}" in assert_refused(tmp_path / "checkpoint.pt", capsys)


def copied(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> ModuleType:
    """A copy of the RND script, changed as a user would, as a module; `folder` becomes the working folder."""
    text = (ROOT / f"{RND}.py").read_text()
    assert text.count(old) == 1
    (folder / "mine.py").write_text(text.replace(old, new))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return importlib.import_module("mine")


def test_copy_with_a_flag_of_its_own_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the default of a float is written as an integer."""
    flag = "    update_proportion: float | None = None\n"
    mine = copied(
        tmp_path, monkeypatch, flag, f'    beta: float = 1\n    """a weight"""\n    eta: float | None = 2\n{flag}'
    )
    assert call_main(mine, flags(1)) == 0
    assert call_main(mine, ["--resume", "runs/run", "--total-timesteps", str(2 * BATCH)]) == 0
    assert read_checkpoint(Path("runs/run"))["counters"]["iteration"] == 2


TABLE = """
        self.table = Table()


class Table:
    counts = {}

    def state_dict(self):
        return self.counts

    def load_state_dict(self, state):
        self.counts = state
"""


def test_state_that_cannot_be_read_back_is_noticed_when_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A copy that keeps arrays of NumPy in its Learner: at the start it ends, later the last checkpoint stays."""
    line = "        self.predictor_optimizer = adam(self.predictor.parameters())\n"
    mine = copied(tmp_path, monkeypatch, line, line + TABLE)
    plain = mine.Table.counts
    mine.Table.counts = {"a": np.zeros(2)}
    assert call_main(mine, flags(1)) == 2
    message = one_line(capsys)
    assert "cannot write to runs/run" in message and "numpy" in message
    assert not Path("runs/run").exists()

    mine.Table.counts = plain
    update = mine.update
    monkeypatch.setattr(mine, "update", lambda *inputs: (mine.Table.counts.update(a=np.zeros(2)), update(*inputs))[1])
    assert call_main(mine, flags(1)) == 0
    message = one_line(capsys)
    assert "no checkpoint was written, the last one stays" in message and "numpy" in message
    assert read_checkpoint(Path("runs/run"))["counters"]["iteration"] == 0
    assert not Path("runs/run/checkpoint.tmp").exists()


def test_checkpoint_with_other_parts_is_refused_by_name(
    rnd_state: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As after something was added to the Learner of a script, or taken away."""
    parts = rnd_state["learner"]
    for part, learner in [
        ("table", parts | {"table": {}}),
        ("int_returns", {name: state for name, state in parts.items() if name != "int_returns"}),
    ]:
        torch.save(rnd_state | {"learner": learner}, tmp_path / "checkpoint.pt")
        assert f"other parts of the Learner: ['{part}']" in assert_refused(tmp_path / "checkpoint.pt", capsys)


@pytest.mark.parametrize("optimiser", ["RMSprop(parameters, lr=1e-4)", "SGD(parameters, lr=1e-4, momentum=0.9)"])
def test_copy_with_another_optimiser_resumes(optimiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other optimisers keep other moments and settings than Adam."""
    line = "        self.predictor_optimizer = adam(self.predictor.parameters())\n"
    other = line.replace("adam(self.predictor.parameters())", f"torch.optim.{optimiser}")
    mine = copied(tmp_path, monkeypatch, line, other.replace("parameters,", "self.predictor.parameters(),"))
    assert call_main(mine, flags(1)) == 0
    saved = read_checkpoint(Path("runs/run"))["learner"]["predictor_optimizer"]
    assert saved["state"] and "exp_avg" not in saved["state"][0]
    assert call_main(mine, ["--resume", "runs/run", "--total-timesteps", str(2 * BATCH)]) == 0
    assert read_checkpoint(Path("runs/run"))["counters"]["iteration"] == 2


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "step"])
def test_optimiser_of_another_network_is_refused(
    rnd_state: dict, moment: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """PyTorch itself does not compare the shapes of an optimiser's state."""
    state = copy.deepcopy(rnd_state)
    state["learner"]["optimizer"]["state"][0][moment] = torch.zeros(3, 2)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert_refused(tmp_path / "checkpoint.pt", capsys)


class Touch:
    """Pickled code: makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_pickled_code_does_not_run(rnd_state: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither in torch's format, old or new, nor as a bare pickle."""
    path, proof = tmp_path / "run/checkpoint.pt", tmp_path / "proof"
    path.parent.mkdir()
    state = rnd_state | {"counters": Touch(proof)}
    torch.save(state, path)
    assert_refused(path, capsys)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_refused(path, capsys)
    path.write_bytes(pickle.dumps(Touch(proof)))
    assert_refused(path, capsys)
    assert not proof.exists()


def test_damaged_file_is_refused(rnd_state: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Truncated, with one flipped bit, empty, text, missing, a folder."""
    path = tmp_path / "checkpoint.pt"
    torch.save(rnd_state, path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # in a tensor's data, where nothing but a checksum can tell
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:100], bytes(flipped), b"", b"not a checkpoint\n"):
        path.write_bytes(damaged)
        assert str(path) in assert_refused(path, capsys)
    path.unlink()
    assert call_main(importlib.import_module(RND), ["--resume", str(tmp_path)]) == 2
    assert "give the folder of a run" in one_line(capsys)
    path.mkdir()
    for folder in (tmp_path, tmp_path / ("n" * 300)):  # the latter is a name that no folder can have
        assert call_main(importlib.import_module(RND), ["--resume", str(folder)]) == 2
        assert "give the folder of a run" in one_line(capsys)


def test_no_flipped_byte_goes_unnoticed(rnd_state: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Wherever a byte of the file changes, it is refused, or what is read is the same."""
    script, path, rng = importlib.import_module(RND), tmp_path / "checkpoint.pt", random.Random(1)
    state = rnd_state | {"learner": {"obs_stats": {"mean": torch.arange(300.0)}}}
    torch.save(state, path)
    whole, refused = path.read_bytes(), 0
    for position in rng.sample(range(len(whole)), 300):
        damaged = bytearray(whole)
        damaged[position] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert_equal(script.load_checkpoint(path), state)
        except SystemExit as end:
            assert end.code == 2
            one_line(capsys)
            refused += 1
    assert refused > 150


# ---------------------------------------------------------------------------------------------------------------------
# Real processes
# ---------------------------------------------------------------------------------------------------------------------


def kill_many_times(script: str, kills: int, folder: Path) -> None:
    """Kill -9 and resume a run, every other time inside the write of a checkpoint."""
    run_dir, rng = folder / "runs/run", random.Random(script)
    temporary = run_dir / "checkpoint.tmp"
    arguments, last, newest = [*flags(1, "--checkpoint-interval", "1"), *ENDLESS], -1, 0
    for kill in range(kills):
        process = start(script, arguments, folder)
        wait_for_checkpoint(process, run_dir, newest)
        time.sleep(2 * rng.random())
        if kill % 2:
            wait_until(lambda: temporary.exists() and temporary.stat().st_size > 0, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL

        state = read_checkpoint(run_dir)
        newest = (run_dir / "checkpoint.pt").stat().st_mtime_ns
        iteration = state["counters"]["iteration"]
        assert iteration > last
        for name, part in state["learner"].items():
            for moments in part["state"].values() if name.endswith("optimizer") else ():
                assert moments["step"].item() == iteration
        frames = state["learner"]["obs_stats"]["count"].item()
        assert 0.9 * (2 + 8 * iteration) * 4 <= frames <= (2 + 8 * iteration) * 4
        last, arguments = iteration, ["--resume", "runs/run"]
    process = start(script, arguments, folder)
    wait_for_checkpoint(process, run_dir, newest)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM and "Traceback" not in errors
    iteration = read_checkpoint(run_dir)["counters"]["iteration"]
    assert iteration > last
    assert_whole_curve(run_dir, iteration)
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"checkpoint", "events", "lock"}
    assert not temporary.exists()


def test_killed_run_goes_on(tmp_path: Path) -> None:
    """After a kill -9 at any instant the counters, statistics, optimisers and curves fit together."""
    kill_many_times(SND, 3, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("script", SCRIPTS)
def test_run_killed_twenty_times_goes_on(script: str, tmp_path: Path) -> None:
    """The same twenty times with each script."""
    kill_many_times(script, 20, tmp_path)


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A second process is refused while the first lives. (That a killed one's lock falls, the kills above show.)"""
    monkeypatch.chdir(tmp_path)
    script, run_dir = importlib.import_module(RND), tmp_path / "runs/run"
    process = start(RND, [*flags(1), *ENDLESS], tmp_path)
    try:
        wait_for_checkpoint(process, run_dir)
        assert call_main(script, ["--resume", "runs/run"]) == 2
        assert "runs/run is in use by another process" in one_line(capsys)
        (run_dir / "checkpoint.pt").unlink()
        assert call_main(script, flags(1)) == 2
        assert "runs/run is in use by another process" in one_line(capsys)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert read_checkpoint(run_dir)["counters"]["iteration"] > 0
