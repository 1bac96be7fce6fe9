"""The entropy stream against numpy over explicit windows."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_args, make_learner, make_rollout

import ppo_snd_entropy_atari as entropy


@pytest.mark.parametrize("size", [2, 3, 20])
@torch.no_grad()
def test_entropy_rewards(size: int):
    """Row t is paid for the window up to obs[t + 1]; an episode's first observation fills it; rollouts join.

    Between the rollouts the encoder learns: who stands still is not paid for that. Reset rows are paid nothing.
    """
    args = make_args(entropy, entropy_buffer_size=size, entropy_scale=0.9, num_steps=10)
    learner, ring, windows = make_learner(entropy, args), entropy.FeatureRing(size), np.zeros((4, size, 256))
    dones = torch.zeros(10, 4, dtype=torch.bool)
    none = torch.zeros_like(dones)
    dones[4, 0] = dones[9, 1] = dones[0, 2] = dones[7, 2] = True  # game 3 goes on
    rollouts = [make_rollout(entropy, dones, dones, ~none[0])]
    rollouts.append(make_rollout(entropy, dones.roll(2, 0), dones.roll(2, 0), ~dones[9], seed=1))
    rollouts.append(make_rollout(entropy, none, none, ~dones[7], seed=2))
    for before, after in itertools.pairwise(rollouts):
        after.obs[0] = before.obs[-1]
    rollouts[1].obs[8:, 3] = rollouts[2].obs[:, 3] = rollouts[1].obs[7, 3]  # game 3 stands still
    torch.manual_seed(4)
    for rollout in rollouts:
        rewards = entropy.entropy_rewards(learner, rollout, ring, args)
        first, *features = (learner.encoder(obs.float() / 256).double().numpy()[:, None] for obs in rollout.obs)
        windows += first - windows[:, -1:]  # of the last `size` features of each game
        for t, valid in enumerate(rollout.valid):
            longer = np.concatenate([windows[:, 1:], features[t]], axis=1)
            windows = np.where(valid[:, None, None], longer, features[t])
            expected = 0.9 * windows.std(axis=1, ddof=1).mean(axis=1)
            np.testing.assert_allclose(rewards[t].numpy(), expected.clip(0, 1), atol=1e-4)
            assert (rewards[t][~valid] == 0).all()
        for parameter in learner.encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert rewards[:, :3].mean() > 0.1 and rewards.max() < 1 and (size > 3 or rewards[:, 3].max() < 1e-3)
    args.entropy_scale = 1e6
    rewards = entropy.entropy_rewards(learner, rollouts[1], ring, args)
    assert torch.equal(rewards[:5], rollouts[1].valid[:5].float())
