"""Running statistics against numpy in float64."""

from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import BACKENDS, Recorder, make_args, random_rollout


@pytest.mark.parametrize("shape", [(), (1, 5, 7)])
def test_running_mean_std(snd: ModuleType, shape: tuple[int, ...]) -> None:
    """Ragged batches, one of a single row, give the moments of all rows together."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (rows, *shape)).astype(np.float32) for rows in (1, 7, 300, 2, 64, 1)]
    stats = snd.RunningMeanStd(shape)
    for i, batch in enumerate(batches):
        stats.update(torch.from_numpy(batch))
        rows = np.concatenate(batches[: i + 1]).astype(np.float64)
        np.testing.assert_allclose(stats.mean.numpy(), rows.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(stats.var.numpy(), rows.var(axis=0), rtol=1e-5, atol=1e-6)
        assert stats.count == len(rows)
    assert stats.mean.dtype == stats.var.dtype == torch.float64 and stats.mean.shape == shape


def test_running_mean_std_stays_exact(snd: ModuleType) -> None:
    """A small deviation around a mean far from zero survives many updates."""
    rng = np.random.default_rng(1)
    batches = [(0.9 + 0.001 * rng.standard_normal((50, 3))).astype(np.float32) for _ in range(400)]
    stats = snd.RunningMeanStd((3,))
    for batch in batches:
        stats.update(torch.from_numpy(batch))
    rows = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(stats.mean.numpy(), rows.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(stats.var.numpy(), rows.var(axis=0), rtol=1e-3)


def test_discounted_returns(snd: ModuleType) -> None:
    """Discounted over time, one sum an environment, carried on between rollouts, standing still on reset rows."""
    rng = np.random.default_rng(2)
    gamma, num_envs, seen = 0.9, 5, []
    running, sums = snd.DiscountedReturns(num_envs), [0.0] * num_envs
    for num_steps in (6, 1, 9):
        rewards, valid = rng.random((num_steps, num_envs)).astype(np.float32), rng.random((num_steps, num_envs)) < 0.8
        for t, i in np.argwhere(valid):
            sums[i] = gamma * sums[i] + float(rewards[t, i])
            seen.append(sums[i])
        running.update(torch.from_numpy(rewards), torch.from_numpy(valid), gamma)
        np.testing.assert_allclose(running.returns.numpy(), sums, rtol=1e-5)
        np.testing.assert_allclose(running.stats.var.item(), np.var(seen), rtol=1e-5)
        assert running.stats.count == len(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_init_obs_stats(snd: ModuleType, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest frames that random actions were chosen on, without reset rows; every game plays every action."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 25)
    records, played, envs = [], [], snd.AtariEnvs

    def record(args: object, seed: int) -> object:
        monkeypatch.setattr(snd, "AtariEnvs", envs)
        records.append(Recorder(snd, args, seed))
        send = records[0].envs.send
        records[0].envs.send = lambda group, actions: played.append(actions) or send(group, actions)
        return records[0].envs

    monkeypatch.setattr(snd, "AtariEnvs", record)
    args = make_args(snd, env_backend=backend, norm_init_steps=60, num_envs=3)
    stats = snd.RunningMeanStd((1, 96, 96))
    snd.init_obs_stats(stats, args, seed=7)
    record = records[0].stack()
    assert record.resets[:-1].sum() >= 2 * 3  # there was something to skip
    frames = record.obs[:-1][~record.resets[:-1]][:, -1:].astype(np.float64) / 256
    assert stats.count == len(frames) == 60 * 3 - record.resets[:-1].sum()
    np.testing.assert_allclose(stats.mean.numpy(), frames.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.var.numpy(), frames.var(axis=0), atol=1e-6)
    actions = np.stack(played).T
    assert all((np.bincount(one, minlength=4) > 3).all() for one in actions) and (actions[0] != actions[1]).any()


def test_update_obs_stats(snd: ModuleType) -> None:
    """The newest frames of the valid rows only, not of the row after the last; also where they fill several chunks."""
    rollout = random_rollout(snd, 20, 40)
    stats = snd.RunningMeanStd((1, 96, 96))
    snd.update_obs_stats(stats, rollout)
    frames = rollout.obs[:-1][rollout.valid][:, -1:].numpy() / 256
    assert snd.CHUNK < len(frames) < 20 * 40 and stats.count == len(frames)
    np.testing.assert_allclose(stats.mean.numpy(), frames.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.var.numpy(), frames.var(axis=0), atol=1e-6)


@pytest.mark.parametrize("norm_obs", ["none", "mean", "mean-std"])
def test_novelty_input(snd: ModuleType, norm_obs: str) -> None:
    """The newest frame / 256, minus the mean, divided by the deviation and clamped; older frames do not matter.

    A pixel that never changed gives 0 as long as it stays, and -1 or 1 when it has changed much.
    """
    rng = np.random.default_rng(4)
    seen = rng.integers(100, 140, (50, 1, 96, 96)).astype(np.float32) / 256
    seen[:, 0, 0, :2] = 0.5
    stats = snd.RunningMeanStd((1, 96, 96))
    stats.update(torch.from_numpy(seen))
    obs = rng.integers(0, 256, (3, 4, 96, 96), dtype=np.uint8)
    obs[:, -1, 0, :2] = 128, 0
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
