"""Running statistics against numpy in float64."""

import numpy as np
import pytest
import torch
from conftest import BACKENDS, Recorder, make_args, random_rollout

import ppo_snd_atari as snd


def check(stats: snd.RunningMeanStd, rows: np.ndarray, rtol: float = 1e-5) -> None:
    """They are the moments of these rows, taken in float64."""
    assert stats.count == len(rows) and stats.mean.dtype == stats.var.dtype == torch.float64
    np.testing.assert_allclose(stats.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(stats.var, rows.var(axis=0, dtype=np.float64), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize(("mean", "std", "sizes"), [(3, 2, (1, 7, 300, 2, 64, 1)), (0.9, 0.001, (50,) * 400)])
def test_running_mean_std(mean: float, std: float, sizes: tuple[int, ...]):
    """The moments of all rows together: of ragged batches, and of a small deviation far from zero."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(mean, std, (rows, 1, 5, 7)).astype(np.float32) for rows in sizes]
    stats = snd.RunningMeanStd((1, 5, 7))
    for batch in batches:
        stats.update(torch.from_numpy(batch))
    check(stats, np.concatenate(batches), rtol=1e-3 * (std < 1) + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_init_obs_stats(backend: str, monkeypatch: pytest.MonkeyPatch):
    """The newest frames on which random actions were chosen, without reset rows."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 25)
    args, stats = make_args(snd, env_backend=backend, norm_init_steps=60, num_envs=3), snd.RunningMeanStd((1, 96, 96))
    snd.init_obs_stats(stats, args, seed=7)
    record = Recorder(snd, args, seed=7).play(60, seed=7)
    assert record.resets[:-1].sum() >= 2 * 3  # there was something to skip
    check(stats, record.obs[:-1][~record.resets[:-1]][:, -1:] / 256)


def test_update_obs_stats():
    """The newest frames of the valid rows only, not of the row after the last; also where they fill several chunks."""
    rollout = random_rollout(snd, 20, 40)
    stats = snd.RunningMeanStd((1, 96, 96))
    snd.update_obs_stats(stats, rollout)
    frames = rollout.obs[:-1][rollout.valid][:, -1:].numpy() / 256
    assert snd.CHUNK < len(frames) < 20 * 40
    check(stats, frames)


@pytest.mark.parametrize("norm_obs", ["none", "mean", "mean-std"])
def test_novelty_input(norm_obs: str):
    """The newest frame / 256, minus the mean, divided by the deviation and clamped; older frames do not matter.

    A pixel that never changed gives 0 as long as it stays, and -1 or 1 when it has changed much; what it is divided by
    is no less than one grey level.
    """
    rng = np.random.default_rng(4)
    seen = rng.integers(100, 140, (50, 1, 96, 96)).astype(np.float32) / 256
    seen[:, 0, 0, :3] = 0.5
    seen[::2, 0, 0, 2] += 1 / 256
    stats = snd.RunningMeanStd((1, 96, 96))
    stats.update(torch.from_numpy(seen))
    obs = rng.integers(0, 256, (3, 4, 96, 96), dtype=np.uint8)
    obs[:, -1, 0, :3] = 128, 0, 128
    x = snd.novelty_input(torch.from_numpy(obs), stats, norm_obs)
    expected = obs[:, 3:].astype(np.float64) / 256
    if norm_obs != "none":
        expected = expected - seen.astype(np.float64).mean(axis=0)
    if norm_obs == "mean-std":
        expected = expected / np.maximum(seen.astype(np.float64).std(axis=0), 1 / 256)
        assert (expected > 1).any() and (expected < -1).any()
        expected = expected.clip(-1, 1)
        assert (x[:, 0, 0, 0] == 0).all() and (x[:, 0, 0, 1] == -1).all()
    assert x.shape == (3, 1, 96, 96) and x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-4)
