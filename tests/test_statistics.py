"""Running statistics against numpy in float64."""

from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import BACKENDS, Recorder, make_args


@pytest.mark.parametrize("shape", [(), (1, 5, 7)])
def test_running_mean_std(script: ModuleType, shape: tuple[int, ...]) -> None:
    """Ragged batches, one of a single row, give the moments of all rows together."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (rows, *shape)).astype(np.float32) for rows in (1, 7, 300, 2, 64, 1)]
    stats = script.RunningMeanStd(shape)
    for i, batch in enumerate(batches):
        stats.update(torch.from_numpy(batch))
        rows = np.concatenate(batches[: i + 1]).astype(np.float64)
        np.testing.assert_allclose(stats.mean.numpy(), rows.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(stats.var.numpy(), rows.var(axis=0), rtol=1e-5, atol=1e-6)
        assert stats.count == len(rows)
    assert stats.mean.dtype == stats.var.dtype == torch.float64 and stats.mean.shape == shape


def test_running_mean_std_stays_exact(script: ModuleType) -> None:
    """A small deviation around a mean far from zero survives many updates."""
    rng = np.random.default_rng(1)
    batches = [(0.9 + 0.001 * rng.standard_normal((50, 3))).astype(np.float32) for _ in range(400)]
    stats = script.RunningMeanStd((3,))
    for batch in batches:
        stats.update(torch.from_numpy(batch))
    rows = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(stats.mean.numpy(), rows.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(stats.var.numpy(), rows.var(axis=0), rtol=1e-3)


def test_discounted_returns(script: ModuleType) -> None:
    """Discounted over time, one sum an environment, carried on between rollouts, standing still on reset rows."""
    rng = np.random.default_rng(2)
    gamma, num_envs, seen = 0.9, 5, []
    running, sums = script.DiscountedReturns(num_envs), [0.0] * num_envs
    for num_steps in (6, 1, 9):
        rewards, valid = rng.random((num_steps, num_envs)).astype(np.float32), rng.random((num_steps, num_envs)) < 0.8
        rewards *= valid
        for t in range(num_steps):
            for i in range(num_envs):
                if valid[t, i]:
                    sums[i] = gamma * sums[i] + float(rewards[t, i])
                    seen.append(sums[i])
        inds = torch.from_numpy(np.flatnonzero(valid))
        running.update(torch.from_numpy(rewards), torch.from_numpy(valid), inds, gamma)
        np.testing.assert_allclose(running.returns.numpy(), sums, rtol=1e-5)
        np.testing.assert_allclose(running.stats.var.item(), np.var(seen), rtol=1e-5)
        assert running.stats.count == len(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_init_obs_stats_skips_reset_rows(
    snd: ModuleType, backend: str, short_episodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics are those of the newest frames that the random actions were chosen on, without reset rows."""
    recorders = []

    def record(args: object, seed: int) -> object:
        recorders.append(Recorder(original, args, seed))
        return recorders[0].envs

    original = type("Script", (), {"AtariEnvs": snd.AtariEnvs})
    monkeypatch.setattr(snd, "AtariEnvs", record)
    args = make_args(snd, env_backend=backend, norm_init_steps=60, num_envs=3)
    stats = snd.RunningMeanStd((1, 96, 96))
    snd.init_obs_stats(stats, args, seed=7)
    obs, reset = np.stack(recorders[0].obs[:-1]), np.stack(recorders[0].dones[:-1])
    assert reset.sum() >= 2 * 3  # there was something to skip
    frames = obs[~reset][:, -1:].astype(np.float64) / 256
    assert stats.count == len(frames) == 60 * 3 - reset.sum()
    np.testing.assert_allclose(stats.mean.numpy(), frames.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.var.numpy(), frames.var(axis=0), atol=1e-6)


def test_update_obs_stats(script: ModuleType) -> None:
    """The newest frame of the given rows only, also where they do not fit in one batch."""
    rng = np.random.default_rng(3)
    obs = rng.integers(0, 256, (60, 4, 96, 96), dtype=np.uint8)
    inds = rng.choice(60, 5000)
    stats = script.RunningMeanStd((1, 96, 96))
    script.update_obs_stats(stats, torch.from_numpy(obs), torch.from_numpy(inds))
    weights = np.bincount(inds, minlength=60) / len(inds)
    frames = obs[:, -1:].astype(np.float64) / 256
    mean = np.tensordot(weights, frames, axes=1)
    np.testing.assert_allclose(stats.mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(stats.var.numpy(), np.tensordot(weights, (frames - mean) ** 2, axes=1), atol=1e-6)
    assert stats.count == 5000


@pytest.mark.parametrize("norm_obs", ["none", "mean", "mean-std"])
def test_novelty_input(script: ModuleType, norm_obs: str) -> None:
    """The newest frame / 256, minus the mean, divided by the deviation and clamped; older frames do not matter."""
    rng = np.random.default_rng(4)
    seen = rng.integers(100, 140, (50, 1, 96, 96)).astype(np.float32) / 256
    stats = script.RunningMeanStd((1, 96, 96))
    stats.update(torch.from_numpy(seen))
    obs = rng.integers(0, 256, (3, 4, 96, 96), dtype=np.uint8)
    x = script.novelty_input(torch.from_numpy(obs), stats, norm_obs)
    expected = obs[:, 3:].astype(np.float64) / 256
    if norm_obs != "none":
        expected = expected - seen.astype(np.float64).mean(axis=0)
    if norm_obs == "mean-std":
        expected = expected / seen.astype(np.float64).std(axis=0)
        assert (expected > 1).any() and (expected < -1).any() and (np.abs(expected) < 1).any()
        expected = expected.clip(-1, 1)
    assert x.shape == (3, 1, 96, 96) and x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-4)


def test_novelty_input_of_constant_pixels(script: ModuleType) -> None:
    """A pixel that never changed gives 0 as long as it stays, and finite numbers when it changes."""
    stats = script.RunningMeanStd((1, 96, 96))
    stats.update(torch.full((10, 1, 96, 96), 0.5))
    obs = torch.full((2, 4, 96, 96), 128, dtype=torch.uint8)
    obs[1] = 0
    x = script.novelty_input(obs, stats, "mean-std")
    assert (x[0] == 0).all() and (x[1] == -1).all()


def test_init_obs_stats_plays_at_random(snd: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every action, in each environment on its own."""
    played, step = [], snd.AtariEnvs.step
    monkeypatch.setattr(snd.AtariEnvs, "step", lambda envs, actions: played.append(actions) or step(envs, actions))
    snd.init_obs_stats(snd.RunningMeanStd((1, 96, 96)), make_args(snd, norm_init_steps=100, num_envs=2), seed=7)
    first, second = np.stack(played).T
    assert (np.bincount(first, minlength=4) > 10).all() and (first != second).any()
