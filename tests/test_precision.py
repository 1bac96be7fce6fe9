"""The precision benchmark's pieces: TF32 rounding, the ratio check, and the novelty reward in each precision."""

import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import precision
import pytest
import torch
from conftest import RND, ROOT, empty_obs, make_args, make_learner
from torch import Tensor

SCRIPT = importlib.import_module(RND)


def tf32_reference(x: float) -> float:
    """x rounded to 11 significant bits by Python's own float arithmetic, ties to even."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**11), exponent - 11)


def test_tf32_rounding_against_reference() -> None:
    """Random numbers of every magnitude, exact ties both ways, zeros of both signs, and what must not change."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(2000) * 2.0 ** rng.integers(-60, 60, 2000)
    ties = [sign * (1 + k * 2**-10 + 2**-11) for k in range(20) for sign in (1, -1)]
    values = np.concatenate([values, ties, [0.0, -0.0, 1.0, -2.5, 1.9999999]]).astype(np.float32)
    rounded = precision.round_to_tf32(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(rounded, np.array([tf32_reference(float(v)) for v in values], np.float32))
    assert not (rounded.view(np.uint32) & 0x1FFF).any()  # the 13 lowest bits are gone
    assert (np.signbit(rounded) == np.signbit(values)).all()


def test_emulated_tf32_runs_every_layer_in_tf32() -> None:
    """It equals the network on weights and inputs that were exact in TF32 already, and differs on others."""
    net, x = make_learner(SCRIPT, make_args(SCRIPT)).target, torch.rand(3, 1, 96, 96)
    with torch.no_grad():
        plain, emulated = net(x), precision.emulated_tf32(net, x)
        error = (emulated - plain).abs().max() / plain.abs().max()
        assert 1e-6 < error < 2**-9
        first = torch.nn.Sequential(net[0])
        first[0].weight.copy_(precision.round_to_tf32(first[0].weight))
        x = precision.round_to_tf32(x)
        torch.testing.assert_close(precision.emulated_tf32(first, x), first(x), rtol=1e-6, atol=1e-6)


def real_rollout(args: object, learner: object) -> tuple[object, Tensor]:
    """A rollout of Breakout by the learner, and its frame buffer."""
    envs = SCRIPT.AtariEnvs(args, 1)
    obs = empty_obs(args)
    random.seed(1)
    rollout = SCRIPT.collect_rollout(envs, learner, obs, args)
    envs.close()
    return rollout, obs


def test_ratio_check_finds_a_moved_policy() -> None:
    """Float32 against itself is at rounding; stored log-probabilities moved by d give exactly |e^-d - 1|."""
    args = make_args(SCRIPT)
    learner = make_learner(SCRIPT, args)
    rollout, _ = real_rollout(args, learner)
    errors = precision.ratio_errors(SCRIPT, learner, rollout, args)
    assert errors.shape == (len(rollout.valid_inds),) and errors.max() < 1e-5
    rollout.logprobs[:] += 0.05
    errors = precision.ratio_errors(SCRIPT, learner, rollout, args)
    np.testing.assert_allclose(errors, 1 - math.exp(-0.05), atol=1e-5)


def test_sharpened_policy_has_the_entropy_asked_for() -> None:
    args = make_args(SCRIPT)
    learner = make_learner(SCRIPT, args)
    _, obs = real_rollout(args, learner)
    obs = obs.flatten(0, 1)
    with torch.no_grad():
        before = precision.mean_entropy(learner.agent(obs)[0])
        scale = precision.sharpen(learner.agent, obs, before / 2)
        assert scale > 1
        assert precision.mean_entropy(learner.agent(obs)[0]) == pytest.approx(before / 2, rel=0.01)


def test_novelty_precisions_keep_their_order() -> None:
    """On real frames float32 is nearer to float64 than TF32, and TF32 nearer than bfloat16."""
    args = make_args(SCRIPT, int_reward_scale=1e-4)  # an untrained predictor's reward, without the clip at 1
    learner, frames = make_learner(SCRIPT, args), precision.random_frames(SCRIPT, args, 16, torch.device("cpu"))
    assert frames.shape == (16, 4, 96, 96) and frames.dtype == torch.uint8
    SCRIPT.update_obs_stats(learner.obs_stats, frames, torch.arange(16))
    exact = precision.rewards_in("float64", SCRIPT, learner, frames, args)
    assert exact.dtype == torch.float64 and exact.min() > 0 and exact.max() < 1
    errors = [
        (precision.rewards_in(name, SCRIPT, learner, frames, args) - exact).abs().mean().item()
        for name in precision.PRECISIONS
    ]
    assert errors[0] < errors[1] / 10 < errors[2] / 10


def test_command_line(tmp_path: Path) -> None:
    """A tiny run prints every row and writes the same figures; nothing else is left behind."""
    command = [sys.executable, str(ROOT / "benchmark" / "precision.py"), "--device", "cpu", "--iterations", "1"]
    tiny = ["--num-envs", "4", "--num-steps", "4", "--num-frames", "16", "--max-updates", "1", "--out", "p.json"]
    done = subprocess.run([*command, *tiny], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "p.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert len(figures["policy"]) == 6 and [row["script"] for row in figures["novelty"]] == [RND, "ppo_snd_atari"]
    assert done.stdout.count("emulated") == 2
    refused = subprocess.run([*command, "--num-frames", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--num-frames" in refused.stderr
