"""Each script as its user runs it: real games, both backends, every model, its logs, its errors."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ENTROPY, ENVIRONMENT, RND, ROOT, SCRIPTS, SND, make_args, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "charts/learning_rate",
    "charts/explored_rooms",
    "charts/intrinsic_reward",
    "charts/intrinsic_reward_std",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/distillation",
}
EPISODIC = {"charts/episodic_return", "charts/episodic_length"}
MORE_TAGS = {RND: set(), SND: {"losses/contrastive"}}
MORE_TAGS[ENTROPY] = {"losses/contrastive", "losses/contrastive_entropy", "charts/entropy_reward"}
FLAGS = [
    "seed",
    "torch-deterministic",
    "cuda",
    "track",
    "wandb-project-name",
    "wandb-entity",
    "env-id",
    "env-backend",
    "total-timesteps",
    "learning-rate",
    "num-envs",
    "num-steps",
    "num-minibatches",
    "update-epochs",
    "gamma",
    "int-gamma",
    "gae-lambda",
    "clip-coef",
    "ent-coef",
    "vf-coef",
    "max-grad-norm",
    "ext-coef",
    "int-coef",
    "model",
    "actor-hidden-gain",
    "critic-hidden-gain",
    "norm-obs",
    "norm-init-steps",
    "norm-int-reward",
    "int-reward-scale",
    "int-episodic",
    "update-proportion",
    "repeat-action-probability",
    "episodic-life",
    "run-name",
    "resume",
    "checkpoint-interval",
    "compile",
]
ENTROPY_FLAGS = ["entropy-coef", "entropy-gamma", "entropy-scale", "entropy-buffer-size"]

# Every script on both backends, every model, a game with rooms and one without.
LONG = ["--num-envs", "4", "--num-steps", "80", "--num-minibatches", "2", "--total-timesteps", "1000"]
LONG += ["--env-id", "BreakoutNoFrameskip-v4"]  # 3 iterations of 320 steps: a random game ends within them
SHORT = ["--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--total-timesteps", "64"]
SHORT += ["--env-id", "ALE/MontezumaRevenge-v5"]
COMMON = ["--update-epochs", "1", "--norm-init-steps", "3", "--no-cuda", "--run-name", "x"]
RUNS = {
    (RND, "first"): [*LONG, "--model", "A"],
    (SND, "first"): [*LONG, "--model", "A"],
    (ENTROPY, "first"): [*LONG, "--model", "A"],
    (RND, "gymnasium"): [*SHORT, "--model", "B", "--env-backend", "gymnasium"],
    (SND, "gymnasium"): [*SHORT, "--model", "C", "--env-backend", "gymnasium"],
    (ENTROPY, "gymnasium"): [*SHORT, "--model", "D", "--env-backend", "gymnasium"],
}


def read(folder: Path) -> SimpleNamespace:
    """What TensorBoard finds in a run folder: {tag: [(step, value)]} and the text of the hyperparameters."""
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = events.Tags()["tensors"]
    assert texts == ["hyperparameters/text_summary"]
    return SimpleNamespace(scalars=scalars, text=events.Tensors(texts[0])[0].tensor_proto.string_val[0].decode())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, SimpleNamespace]:
    """The runs above, each in its own folder."""
    results = {}
    for (script, name), flags in RUNS.items():
        folder = tmp_path_factory.mktemp(f"{script}-{name}")
        process = run_script(script, [*flags, *COMMON], folder)
        assert process.returncode == 0, process.stderr
        results[script, name] = SimpleNamespace(process=process, folder=folder, log=read(folder / "runs" / "x"))
    return results


@pytest.mark.parametrize("name", ["first", "gymnasium"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_tags(runs: dict[tuple, SimpleNamespace], script: str, name: str) -> None:
    """Exactly the tags of the specification, once an iteration, over agent steps; all finite."""
    run = runs[script, name]
    tags = set(run.log.scalars)
    if name == "first":  # Breakout: games end, no rooms are known
        assert tags == (TAGS | MORE_TAGS[script]) - {"charts/explored_rooms"}
        steps = [320, 640, 960]
    else:
        assert tags - EPISODIC == (TAGS | MORE_TAGS[script]) - EPISODIC
        steps = [32, 64]
    for tag, events in run.log.scalars.items():
        if tag not in EPISODIC:  # these only where a game ended
            assert [step for step, _ in events] == steps
        assert {step for step, _ in events} <= set(steps)
        assert all(torch.tensor(value).isfinite() for _, value in events), tag
    assert all(value > 0 for _, value in run.log.scalars["charts/intrinsic_reward"])
    assert all(value == pytest.approx(1e-4) for _, value in run.log.scalars["charts/learning_rate"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_hyperparameters(runs: dict[tuple, SimpleNamespace], script: str) -> None:
    """Every argument stands in the text, with the value it had."""
    text = runs[script, "first"].log.text
    assert text.startswith("|param|value|\n|-|-|\n|")
    rows = dict(re.findall(r"^\|(\w+)\|(.*)\|$", text, re.MULTILINE))
    assert {name.replace("_", "-") for name in rows} >= {*FLAGS, *(ENTROPY_FLAGS if script == ENTROPY else [])}
    assert (rows["num_steps"], rows["model"], rows["env_id"]) == ("80", "A", "BreakoutNoFrameskip-v4")


# The settings of the experiments that the scripts share.
DEFAULTS = dict(
    total_timesteps=128_000_000, num_envs=128, num_steps=128, num_minibatches=32, update_epochs=4, model="C"
)
DEFAULTS |= dict(learning_rate=1e-4, gamma=0.998, int_gamma=0.99, gae_lambda=0.95, clip_coef=0.1, max_grad_norm=0.5)
DEFAULTS |= dict(ent_coef=0.001, vf_coef=0.5, ext_coef=2, int_coef=1, int_reward_scale=0.5, update_proportion=None)
DEFAULTS |= dict(repeat_action_probability=0.25, episodic_life=False, int_episodic=False, norm_int_reward=False)
DEFAULTS |= dict(actor_hidden_gain=0.01, critic_hidden_gain=0.1, env_id="MontezumaRevengeNoFrameskip-v4")


def test_defaults(script: ModuleType) -> None:
    """Those of the experiments; tests/test_envs.py shows that the longest episode is as long as this number says."""
    assert script.MAX_EPISODE_STEPS == 4500
    expected = DEFAULTS | {"norm_obs": "mean" if script.__name__ == RND else "mean-std"}
    if script.__name__ == ENTROPY:
        expected |= dict(entropy_coef=1, entropy_gamma=0.99, entropy_scale=0.02, entropy_buffer_size=128)
    assert expected.items() <= vars(script.Args()).items()


def test_progress(snd: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """A resumed run's rate is that of the steps since then, and tells the time left; the return is a mean."""
    progress = snd.Progress(make_args(snd, total_timesteps=1_000_000), 600_000)
    progress.start -= 1000
    progress.show(700_000, deque([1.0, 2.0, 6.0]), {1, 5}, 0.25, final=True)
    line = "700,000 / 1,000,000 steps | 100 steps/s | 0:50 h left | return 3.0 | rooms 2 | r_int 0.2500\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("script", SCRIPTS)
def test_plain_progress(runs: dict[tuple, SimpleNamespace], script: str) -> None:
    """Output that is not a terminal gets whole lines; nothing goes to standard error; a checkpoint is left.

    The first line comes before the games are started, so that nobody waits in the dark.
    """
    for name, total, rooms in (("first", "960 / 1,000", ""), ("gymnasium", "64 / 64", r" \| rooms 1")):
        run = runs[script, name]
        lines = run.process.stdout.splitlines()
        pattern = rf"{total} steps \| [\d,]+ steps/s \| \d+:\d\d h left \| return (-|[\d.]+){rooms} \| r_int [\d.]+"
        assert re.fullmatch(r"runs/x \| \d+ iterations of \d+ steps on (cpu|cuda)", lines[0])
        assert re.fullmatch(pattern, lines[-1])
        assert "\r" not in run.process.stdout and "\x1b" not in run.process.stdout
        assert run.process.stderr == ""
        assert (run.folder / "runs" / "x" / "checkpoint.pt").is_file()
        assert [path.name for path in run.folder.iterdir()] == ["runs"]


def without_speed(scalars: dict[str, list]) -> dict[str, list]:
    """The scalars but for the one that measures time."""
    return {tag: events for tag, events in scalars.items() if tag != "charts/SPS"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_copied_script_and_same_seed(runs: dict[tuple, SimpleNamespace], script: str, tmp_path: Path) -> None:
    """One script and models.py in an empty folder are a working program, and the same seed gives the same scalars."""
    for name in (f"{script}.py", "models.py"):
        shutil.copy(ROOT / name, tmp_path)
    process = run_script(tmp_path / f"{script}.py", [*RUNS[script, "first"], *COMMON], tmp_path)
    assert process.returncode == 0, process.stderr
    copied = read(tmp_path / "runs" / "x").scalars
    assert without_speed(copied) == without_speed(runs[script, "first"].log.scalars)


def test_other_seed_and_default_name(runs: dict[tuple, SimpleNamespace], tmp_path: Path) -> None:
    """Another seed gives other scalars; a run without a name is called after game, script, seed and time."""
    flags = [*RUNS[SND, "first"], *COMMON[:-3], "--seed", "2"]
    process = run_script(SND, flags, tmp_path)
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"Breakout__ppo_snd_atari__2__\d{10}", folder.name)
    other, first = read(folder).scalars, runs[SND, "first"].log.scalars
    assert other["losses/policy_loss"] != first["losses/policy_loss"]
    assert other["charts/intrinsic_reward"] != first["charts/intrinsic_reward"]
    if not torch.cuda.is_available():  # --cuda is the default
        assert process.stderr.count("\n") == 1 and "CUDA" in process.stderr and "CPU" in process.stderr


def test_live_progress(tmp_path: Path) -> None:
    """In a terminal one line is rewritten in place, and ends with a newline."""
    terminal, inner = pty.openpty()
    command = [sys.executable, str(ROOT / f"{RND}.py"), *SHORT, *COMMON, "--model", "A"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=inner, stderr=inner)
    os.close(inner)
    output, end = b"", time.time() + 180
    try:
        while time.time() < end and select.select([terminal], [], [], 180)[0]:
            try:
                output += os.read(terminal, 4096)
            except OSError:  # the other side is closed
                break
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(terminal)
    lines = output.decode().replace("\r\n", "\n").split("\r")[1:]
    assert [line.split(" steps | ")[0] for line in lines] == ["32 / 64", "64 / 64"]
    assert all(
        re.search(r"steps/s \| 0:00 h left \| return - \| rooms 1 \| r_int [\d.]+\x1b\[K", line) for line in lines
    )
    assert [line.endswith("\n") for line in lines] == [False, True]


def test_help(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """--help names every flag."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    named = set(re.findall(r"--([a-z0-9-]+)", text))
    assert named >= {*FLAGS, *(ENTROPY_FLAGS if script.__name__ == ENTROPY else [])}


BAD_INPUT = [
    (["--env-id", "MontezumaRevengNoFrameskip-v4"], "MontezumaRevengeNoFrameskip-v4"),
    (["--env-id", "CartPole-v1"], "Atari"),
    (["--env-id", ""], "Atari"),
    (["--num-minibatches", "3"], "divide"),
    (["--total-timesteps", "31"], "= 32"),
    (["--run-name", "../x"], "run-name"),
    (["--run-name", ""], "run-name"),
    (["--seed", "-1"], "--seed"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--learning-rate", "inf"], "finite"),
    (["--norm-init-steps", "-1"], "--norm-init-steps"),
    (["--update-proportion", "0"], "--update-proportion"),
    (["--resume", "runs/none"], "checkpoint.pt"),
    *([[f"--{name}", value], f"--{name}"] for name in (
        "num-envs", "num-steps", "num-minibatches", "update-epochs", "total-timesteps", "checkpoint-interval"
    ) for value in ("0", "-1")),
    *([[f"--{name}", value], f"--{name}"] for name in (
        "repeat-action-probability", "gamma", "int-gamma", "gae-lambda", "update-proportion"
    ) for value in ("-0.1", "1.1", "nan")),
    *([[f"--{name}", "-1"], f"--{name}"] for name in (
        "learning-rate", "clip-coef", "ent-coef", "vf-coef", "max-grad-norm", "ext-coef", "int-coef",
        "int-reward-scale", "actor-hidden-gain", "critic-hidden-gain",
    )),
]  # fmt: skip
BAD_ENTROPY_INPUT = [
    (["--entropy-coef", "-1"], "--entropy-coef"),
    (["--entropy-scale", "-1"], "--entropy-scale"),
    (["--entropy-gamma", "1.1"], "--entropy-gamma"),
    (["--entropy-buffer-size", "1"], "--entropy-buffer-size"),
]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> object:
    """Runs `main` in this process: it must end with status 2 before anything is built; returns standard error."""

    def run(script: ModuleType, flags: list[str]) -> str:
        def built(*_: object, **__: object) -> None:
            pytest.fail("something was built")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *SHORT, *flags])
        monkeypatch.setattr(script, "AtariEnvs", built)
        monkeypatch.setattr(script, "Learner", built)
        with pytest.raises(SystemExit) as stop:
            script.main()
        output = capsys.readouterr()
        assert stop.value.code == 2 and output.out == "" and not list(tmp_path.iterdir())
        return output.err

    return run


@pytest.mark.parametrize(("flags", "named"), BAD_INPUT, ids=lambda value: "=".join(value) if len(value) == 2 else "")
def test_bad_input(script: ModuleType, refused: object, flags: list[str], named: str) -> None:
    """One line that names the flag or what to do, exit status 2, no folder."""
    message = refused(script, flags)
    assert message.count("\n") == 1 and named in message and message.startswith(f"{script.__name__}: ")


@pytest.mark.parametrize(("flags", "named"), BAD_ENTROPY_INPUT, ids=lambda value: value[0])
def test_bad_entropy_input(refused: object, flags: list[str], named: str) -> None:
    """The entropy script's own flags."""
    message = refused(__import__(ENTROPY), flags)
    assert message.count("\n") == 1 and named in message


@pytest.mark.parametrize(("backend", "package"), [("envpool", "envpool"), ("gymnasium", "ale_py")])
def test_missing_backend(
    script: ModuleType, refused: object, monkeypatch: pytest.MonkeyPatch, backend: str, package: str
) -> None:
    """A backend that is not installed: the line has the pip command."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = refused(script, ["--env-backend", backend])
    assert message.count("\n") == 1 and "pip install" in message and package.replace("_", "-") in message


def test_missing_wandb(script: ModuleType, refused: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """--track without wandb."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused(script, ["--track"])
    assert message.count("\n") == 1 and "pip install wandb" in message


@pytest.mark.parametrize("flags", [["--model", "E"], ["--env-backend", "ale"], ["--num-envs", "x"], ["--no-such", "1"]])
def test_usage_errors(script: ModuleType, refused: object, flags: list[str]) -> None:
    """What tyro itself refuses: its message names the flag or the value."""
    message = refused(script, flags)
    assert flags[0] in message or flags[1] in message


def test_bad_input_as_a_user_sees_it(tmp_path: Path) -> None:
    """The same from a shell: one line on standard error, nothing else."""
    process = run_script(SND, ["--env-id", "MontezumaRevenge-v4"], tmp_path)
    assert process.returncode == 2 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr.count("\n") == 1 and "MontezumaRevengeNoFrameskip-v4" in process.stderr
