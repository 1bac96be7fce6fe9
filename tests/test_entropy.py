"""The entropy stream against numpy over explicit windows."""

import itertools

import numpy as np
import torch
from conftest import make_args, make_learner, make_rollout, reward_and_estimate, update

import ppo_snd_entropy_atari as entropy


class Windows:
    """The last `size` features of each environment as plain lists; the same methods as FeatureRing, in float64."""

    def __init__(self, size: int):
        self.size, self.windows = size, None

    def begin(self, features: torch.Tensor) -> None:
        """Move every window so that it ends in features (N, dims)."""
        features = features.double().numpy()
        self.windows = self.windows or [[feature] * self.size for feature in features]
        pairs = zip(self.windows, features, strict=True)
        self.windows = [[old + new - window[-1] for old in window] for window, new in pairs]

    def push(self, features: torch.Tensor, starts: torch.Tensor) -> np.ndarray:
        """The deviations (N, dims) after adding features (N, dims); `starts` (N,) bool fills a window."""
        for i, feature in enumerate(features.double().numpy()):
            self.windows[i] = [feature] * self.size if starts[i] else [*self.windows[i][1:], feature]
        return np.stack([np.std(window, axis=0, ddof=1) for window in self.windows])


def test_feature_ring() -> None:
    """The deviations of the last features over long sequences with starts and with an encoder that moves."""
    for size, offset in ((2, 0), (5, 1000), (32, -300)):
        generator = torch.Generator().manual_seed(size)
        ring, windows = entropy.FeatureRing(size), Windows(size)
        features, largest = torch.randn(3, 6, generator=generator) + offset, 0.0
        for t in range(300):
            if t % 40 == 0:
                for each in (ring, windows):
                    each.begin(features + t)
            scale = [1.0, 0.01, 0.0][t // 20 % 3]  # wild, quiet and frozen stretches
            features = scale * torch.randn(3, 6, generator=generator) + offset + t // 40 * 40
            starts = torch.rand(3, generator=generator) < torch.tensor([0.05, 0.01, 0.0])
            deviations = ring.push(features, starts)
            np.testing.assert_allclose(deviations.numpy(), windows.push(features, starts), atol=2e-4, rtol=1e-3)
            assert (deviations[starts] == 0).all()
            largest = max(largest, deviations.max().item())
        assert largest > 0.5 and deviations.dtype == torch.float32


def test_feature_ring_starts_full() -> None:
    """The first feature fills the ring: repeating it gives 0, one other feature of N the deviation of that."""
    first, no_start = torch.tensor([[1.0, 5.0]]), torch.tensor([False])
    ring = entropy.FeatureRing(4)
    ring.begin(first)
    assert (ring.push(first, no_start) == 0).all()
    torch.testing.assert_close(ring.push(first + 2, no_start), torch.tensor([[1.0, 1.0]]))  # of (0, 0, 0, 2)
    ring.begin(first + 1e9)  # the encoder has moved: no change is seen, and a start forgets it
    assert (ring.push(first + 9, torch.tensor([True])) == 0).all()
    torch.testing.assert_close(ring.push(first + 11, no_start), torch.tensor([[1.0, 1.0]]))


@torch.no_grad()
def test_entropy_rewards() -> None:
    """Row t is paid for the window up to obs[t + 1]; an episode's first observation fills it; rollouts join.

    Between the rollouts the encoder learns: who stands still is not paid for that. Reset rows are paid nothing.
    """
    args = make_args(entropy, entropy_buffer_size=3, entropy_scale=0.9, num_steps=10)
    learner, ring, windows = make_learner(entropy, args), entropy.FeatureRing(3), Windows(3)
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
        features = [learner.encoder(obs.float() / 256) for obs in rollout.obs]
        windows.begin(features[0])
        for t, valid in enumerate(rollout.valid):
            expected = 0.9 * windows.push(features[t + 1], ~valid).mean(axis=1)
            np.testing.assert_allclose(rewards[t].numpy(), expected.clip(0, 1), atol=1e-4)
            assert (rewards[t][~valid] == 0).all()
        for parameter in learner.encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert rewards[:, 3].max() < 1e-3 < 0.1 < rewards[:, :3].mean() and rewards.max() < 1
    args.entropy_scale = 1e6
    assert torch.equal(entropy.entropy_rewards(learner, rollouts[0], ring, args), rollouts[0].valid.float())


def test_entropy_flags() -> None:
    """--entropy-coef 0 trains no third value head; the others do."""
    args = make_args(entropy, entropy_coef=0.0)
    none = torch.zeros(8, 4, dtype=torch.bool)
    rollout, learner = make_rollout(entropy, none, none, ~none[0]), make_learner(entropy, args)
    before = learner.agent.values.weight.detach().clone()
    update(entropy, learner, rollout, reward_and_estimate(entropy, learner, rollout, args), args)
    assert (learner.agent.values.weight != before).any(dim=1).tolist() == [True, True, False]
