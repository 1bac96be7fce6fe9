"""Each script as its user runs it: real games, both backends, its flags, its logs, its words, its refusals."""

import copy
import importlib.util
import math
import re
import shutil
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENTROPY, RND, ROOT, SCRIPTS, SND, make_args, reward_and_estimate, run_script, update
from running import BATCH, RUN, assert_equal, call_main, error_line, flags, read_checkpoint, read_events, read_scalars

import ppo_snd_atari as snd

TAGS = """charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate charts/intrinsic_reward
charts/intrinsic_reward_std losses/value_loss losses/policy_loss losses/entropy losses/approx_kl losses/clipfrac
losses/explained_variance losses/distillation """
MORE_TAGS = {RND: "charts/explored_rooms", SND: "charts/explored_rooms losses/contrastive"}  # rooms need EnvPool
MORE_TAGS[ENTROPY] = "losses/contrastive losses/contrastive_entropy charts/entropy_reward"
# Each on another model, one on the other backend; all with game ends and reset rows within their two iterations.
RUNS = {RND: ["--model", "B"], SND: ["--model", "C"], ENTROPY: ["--model", "D", "--env-backend", "gymnasium"]}


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two iterations of a script, with what went into each update and what was left on the disk."""
    script, seen = importlib.import_module(request.param), []
    collect_rollout = script.collect_rollout

    def collect(envs: object, act: object, obs: torch.Tensor, args: object) -> object:
        learner = None if seen else copy.deepcopy(act.args[0])
        assert not envs.finished
        rollout = collect_rollout(envs, act, obs, args)
        envs.finished.append((30.0, 35))  # a better game, too
        one = dict(learner=learner, rollout=copy.deepcopy(rollout), games=[*envs.finished], args=args)
        seen.append(SimpleNamespace(**one, random=torch.get_rng_state()))
        return rollout

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr(script, "MAX_EPISODE_STEPS", 5)
        patch.setattr(script, "collect_rollout", collect)
        assert call_main(script, flags(2, *RUNS[request.param])) == 0
        scalars, text = read_events(RUN)
        return SimpleNamespace(script=script, seen=seen, scalars=scalars, text=text, saved=read_checkpoint(RUN))


def test_tags_and_hyperparameters(run: SimpleNamespace):
    """Exactly the specification's tags, once an iteration, over agent steps; all finite. Every flag and its value."""
    assert run.scalars.keys() == {*(TAGS + MORE_TAGS[run.script.__name__]).split()}
    for tag, points in run.scalars.items():
        assert [step for step, _ in points] == [BATCH, 2 * BATCH], tag
        assert np.isfinite([value for _, value in points]).all(), tag
    rows = [f"|{name}|{value}|" for name, value in asdict(run.seen[0].args).items()]
    assert run.text.splitlines() == ["|param|value|", "|-|-|", *rows]
    assert {"|num_steps|8|", "|total_timesteps|64|", "|cuda|False|"} <= {*rows}


def test_what_is_learned_is_logged_and_saved(run: SimpleNamespace):
    """Each iteration once more from its rollout, step by step: the same numbers, and in the end the same learner."""
    script, learner, args = run.script, run.seen[0].learner, run.seen[0].args
    ring = script.FeatureRing(args.entropy_buffer_size) if script.__name__ == ENTROPY else None
    for i, one in enumerate(run.seen):
        torch.set_rng_state(one.random)
        rollout, valid = one.rollout, one.rollout.valid
        assert not valid.all()
        streams, inputs = reward_and_estimate(script, learner, rollout, args, ring)
        means = [stream[valid].mean() for stream in streams]
        expected = dict(zip(["charts/intrinsic_reward", "charts/entropy_reward"], means, strict=False))
        expected |= {"charts/intrinsic_reward_std": streams[0][valid].std(correction=0), "charts/learning_rate": 1e-4}
        expected["losses/explained_variance"] = script.explained_variance(rollout, *inputs[:2], args)
        losses = update(script, learner, rollout, inputs, args)
        expected |= {f"losses/{name}": loss for name, loss in losses.items()}
        expected |= dict(zip(["charts/episodic_return", "charts/episodic_length"], np.mean(one.games, 0), strict=True))
        assert expected.keys() == run.scalars.keys() - {"charts/SPS", "charts/explored_rooms"}
        logged = {tag: run.scalars[tag][i][1] for tag in expected}
        assert logged == pytest.approx({tag: float(value) for tag, value in expected.items()})
    assert_equal(learner.state_dict(), run.saved["learner"])


def test_redirected_output(tmp_path: Path):
    """Whole lines from the first second on; and a copy beside models.py in an empty folder gives the same scalars."""
    (copied := tmp_path / "mine").mkdir()
    shutil.copy(ROOT / f"{SND}.py", copied / "my_idea.py")
    shutil.copy(ROOT / "models.py", copied)
    arguments = flags(2, "--total-timesteps", "6.4e1")
    process = run_script(SND, arguments, tmp_path)
    run_script(copied / "my_idea", arguments, copied).check_returncode()
    assert read_scalars(copied / RUN, speed=False) == read_scalars(tmp_path / RUN, speed=False)

    first, hint, statistics, *progress, finished, curves, watch = process.stdout.splitlines()
    assert (process.returncode, process.stderr) == (0, "")
    assert first == "runs/run: MontezumaRevenge, 2 iterations of 32 steps on cpu"
    assert "on a CPU" in hint and "--model A --num-envs 32" in hint
    assert statistics == "frame statistics: 2 random steps of each game"
    numbers = r" \| [\d,]+ steps/s \| \d:\d\d:\d\d left \| return - \| rooms 1 \| r_int \d\.\d{4}"
    assert progress[0] == "playing | 0 / 64 steps"
    assert re.fullmatch(rf"saving \| 64 / 64 steps{numbers}", progress[-1])
    assert finished == "finished: 64 steps, runs/run/checkpoint.pt" and (tmp_path / RUN / "checkpoint.pt").is_file()
    assert curves == "curves: tensorboard --logdir runs/run, or python benchmark/curves.py runs/run"
    assert watch == "watch it play: python benchmark/enjoy.py runs/run"
    assert (ROOT / "benchmark/curves.py").is_file() and (ROOT / "benchmark/enjoy.py").is_file()
    assert "\r" not in process.stdout and "\x1b" not in process.stdout


def test_other_seed_and_default_name(folder: Path):
    """Another seed gives other scalars; a run without a name is called after game, script, seed and time."""
    unnamed = flags(1)[:-2]
    assert call_main(snd, unnamed) == call_main(snd, [*unnamed, "--seed", "2"]) == 0
    one, two = sorted(Path("runs").iterdir())
    for folder, seed in ((one, 1), (two, 2)):
        assert re.fullmatch(rf"MontezumaRevenge__ppo_snd_atari__{seed}__\d{{10}}", folder.name)
    start = [read_checkpoint(folder)["learner"]["target.layers.2.weight"] for folder in (one, two)]
    assert (start[0] - start[1]).abs().max() > 0.01  # which no step of 1e-4 explains
    one, two = read_scalars(one), read_scalars(two)
    for tag in ("losses/policy_loss", "losses/contrastive", "charts/intrinsic_reward"):
        assert one[tag] != two[tag]


# Every flag; the settings are those of the experiments.
DEFAULTS = dict(total_timesteps=128_000_000, num_envs=128, num_steps=128, num_minibatches=32, update_epochs=4)
DEFAULTS |= dict(learning_rate=1e-4, gamma=0.998, int_gamma=0.99, gae_lambda=0.95, clip_coef=0.1, max_grad_norm=0.5)
DEFAULTS |= dict(ent_coef=0.001, vf_coef=0.5, ext_coef=2, int_coef=1, int_reward_scale=0.5, update_proportion=None)
DEFAULTS |= dict(repeat_action_probability=0.25, episodic_life=False, int_episodic=False, norm_int_reward=False)
DEFAULTS |= dict(actor_hidden_gain=0.01, critic_hidden_gain=0.1, model="C", norm_init_steps=256)
DEFAULTS |= dict(env_id="MontezumaRevengeNoFrameskip-v4", env_backend="envpool", run_name=None, resume=None, seed=1)
DEFAULTS |= dict(cuda=True, torch_deterministic=True, bf16=True, compile=False, checkpoint_interval=100, track=False)
DEFAULTS |= dict(wandb_project_name="distillation-exploration", wandb_entity=None)
ENTROPY_DEFAULTS = dict(entropy_coef=1, entropy_gamma=0.99, entropy_scale=0.02, entropy_buffer_size=128)


def test_flags(script: ModuleType, capsys: pytest.CaptureFixture):
    """Their defaults; --help names them. test_envs.py shows that the longest episode is as long as this number says."""
    assert script.MAX_EPISODE_STEPS == 4500
    expected = DEFAULTS | {"norm_obs": "mean" if script.__name__ == RND else "mean-std"}
    expected |= ENTROPY_DEFAULTS if script.__name__ == ENTROPY else {}
    assert vars(script.Args()) == expected
    assert call_main(script, ["--help"]) == 0
    assert {f"--{name.replace('_', '-')}" for name in expected} <= {*re.findall(r"--[\w-]+", capsys.readouterr().out)}


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A resumed run's rate is that of the steps since then, and tells the time left; the return is a mean."""
    progress = snd.Progress(make_args(snd, total_timesteps=1_000_000), 600_000)
    monkeypatch.setattr(snd.time, "time", lambda now=progress.start: now + 1000)
    progress.count(700_000, deque([1.0, 2.0, 6.0]), {1, 5}, 0.25)
    progress.show("saving")
    numbers = "700,000 / 1,000,000 steps | 100 steps/s | 0:50:00 left | return 3.0 | rooms 2 | r_int 0.2500"
    assert capsys.readouterr().out == f"saving | {numbers}\n"
    progress.show("playing")  # in the same half minute
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")  # a line that wraps could not be rewritten
    progress.show("playing")
    assert re.fullmatch(r"\r.{19}\x1b\[K", capsys.readouterr().out)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        snd.fail("no")
    assert capsys.readouterr().err == "\r\x1b[Kppo_snd_atari: no\n"  # in place of that line


REFUSED = dict(seed=[-1], num_envs=[0, -1], num_steps=[1], num_minibatches=[0, 3, 64], update_epochs=[0])
REFUSED |= dict(total_timesteps=[0, 31, math.nan, math.inf], checkpoint_interval=[0], norm_init_steps=[0])
REFUSED |= dict(learning_rate=[0, -1, math.nan, math.inf], clip_coef=[0], max_grad_norm=[0], ent_coef=[-1])
REFUSED |= dict(vf_coef=[-1], ext_coef=[-1, math.nan], int_coef=[-1, math.inf], int_reward_scale=[-1])
REFUSED |= dict(gamma=[-0.1, 1.1, math.nan], int_gamma=[-0.1, 1.1], gae_lambda=[-0.1, 1.1])
REFUSED |= dict(repeat_action_probability=[-0.1, 1.1], update_proportion=[0, 1.1, math.nan])
REFUSED |= dict(actor_hidden_gain=[-1], critic_hidden_gain=[-1])
REFUSED_ENTROPY = dict(entropy_coef=[-1], entropy_gamma=[1.1], entropy_scale=[-1], entropy_buffer_size=[1])


def test_values_out_of_range(script: ModuleType, capsys: pytest.CaptureFixture):
    """One line that names flag and value, exit status 2; the limits themselves are taken."""
    for name, values in (REFUSED | (REFUSED_ENTROPY if script.__name__ == ENTROPY else {})).items():
        for value in values:
            with pytest.raises(SystemExit) as stop:
                script.check_args(make_args(script, **{name: value}))
            flag = f"--{name.replace('_', '-')}"
            assert stop.value.code == 2
            assert re.match(rf"{script.__name__}: {flag} '?{value}'?: must ", error_line(capsys))
    for limits in (dict(gamma=0, int_gamma=1, ext_coef=0, int_coef=0), dict(update_proportion=1, total_timesteps=32)):
        script.check_args(make_args(script, **limits))


BAD_INPUT = [
    (["--env-id", "MontezumaRevengNoFrameskip-v4"], "did you mean MontezumaRevengeNoFrameskip-v4"),
    (["--env-id", "MontezumaRevenge-v4"], "did you mean MontezumaRevengeNoFrameskip-v4"),
    (["--env-id", "Montezuma-v5"], "MontezumaRevengeNoFrameskip-v4"),
    (["--env-id", "ALE/Breakout-v4"], "BreakoutNoFrameskip-v4"),
    (["--env-id", "CartPole-v1"], "--env-id CartPole-v1: no Atari game"),
    (["--env-id", ""], "Atari"),
    (["--num-envs", "-1"], "--num-envs -1"),
    (["--cuda", "True"], "write --cuda or --no-cuda"),
    (["--resume", "runs/none"], "give the folder of a run"),
    ([], "pip install envpool"),
    (["--track"], "pip install wandb"),
]


@pytest.mark.parametrize(("given", "words"), BAD_INPUT)
def test_bad_input(
    given: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """One line that names the flag or what to do, exit status 2, no folder, before anything is built."""
    find, missing = importlib.util.find_spec, words.removeprefix("pip install ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    for name in ("AtariEnvs", "Learner"):
        monkeypatch.setattr(snd, name, lambda *_, **__: pytest.fail("something was built"))
    assert call_main(snd, [*flags(2)[:-2], *given]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ppo_snd_atari: ") and words in err and (out, err.count("\n")) == ("", 1)
    assert not list(folder.iterdir())
