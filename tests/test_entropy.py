"""The entropy stream against torch.std over explicit windows."""

import pytest
import torch
from conftest import make_args, make_learner, make_rollout

import ppo_snd_entropy_atari as entropy


class SlowBuffer:
    """The last `size` features of each environment as plain lists, moved along when the encoder has learned."""

    def __init__(self, size: int, first: torch.Tensor):
        self.size = size
        self.windows = [[feature] * size for feature in first]

    def push(self, features: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Deviations (N, dims) after adding features (N, dims); `starts` (N,) bool fills a window."""
        for i, feature in enumerate(features):
            self.windows[i] = [feature] * self.size if starts[i] else [*self.windows[i][1:], feature]
        return torch.stack([torch.stack(window).double().std(dim=0) for window in self.windows])

    def rebase(self, features: torch.Tensor) -> None:
        """Move every window so that it ends in features (N, dims)."""
        for i, window in enumerate(self.windows):
            self.windows[i] = [feature + (features[i] - window[-1]) for feature in window]


@pytest.mark.parametrize(("size", "offset", "steps"), [(2, 0, 200), (5, 1000, 400), (32, -300, 1500), (128, 30, 1000)])
def test_feature_buffer(size: int, offset: float, steps: int) -> None:
    """Equal to torch.std within 1e-4 over long sequences with episode starts, also far from zero."""
    generator = torch.Generator().manual_seed(size)
    first = torch.randn(3, 6, generator=generator) + offset
    buffer, slow = entropy.FeatureBuffer(size, first), SlowBuffer(size, first)
    largest = 0.0
    for t in range(steps):
        scale = [1.0, 0.01, 0.0][t // 50 % 3]  # wild, quiet and frozen stretches
        features = scale * torch.randn(3, 6, generator=generator) + offset
        starts = torch.rand(3, generator=generator) < torch.tensor([0.05, 0.01, 0.0])
        deviations, expected = buffer.push(features, starts), slow.push(features, starts)
        torch.testing.assert_close(deviations.double(), expected, atol=1e-4, rtol=1e-4)
        assert (deviations[starts] == 0).all()
        largest = max(largest, deviations.max().item())
    assert largest > 0.5 and deviations.dtype == torch.float32


def test_feature_buffer_after_a_whole_episode() -> None:
    """4,500 steps without a start leave no drift behind."""
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(1, 4)
    buffer, window = entropy.FeatureBuffer(32, first), []
    for _ in range(4500):
        features = 10 * torch.randn(1, 4, generator=generator) + 50
        deviations = buffer.push(features, torch.tensor([False]))
        window = [*window[-31:], features[0]]
    expected = torch.stack(window).double().std(dim=0)
    torch.testing.assert_close(deviations[0].double(), expected, atol=1e-4, rtol=0)


def test_feature_buffer_starts_full() -> None:
    """The first feature fills the buffer: repeating it gives 0, one different feature in N the deviation of that."""
    first = torch.tensor([[1.0, 5.0]])
    buffer, no_start = entropy.FeatureBuffer(4, first), torch.tensor([False])
    assert (buffer.push(first, no_start) == 0).all()
    deviations = buffer.push(first + 2, no_start)
    torch.testing.assert_close(deviations, torch.tensor([[1.0, 1.0]]))  # of (0, 0, 0, 2)
    buffer.rebase(first + 1e9)  # a start forgets how far the encoder has moved
    assert (buffer.push(first + 9, torch.tensor([True])) == 0).all()
    torch.testing.assert_close(buffer.push(first + 11, no_start), torch.tensor([[1.0, 1.0]]))


@torch.no_grad()
def test_state_entropy_rewards() -> None:
    """Row t is paid for the window up to obs[t + 1]; an episode's first observation fills it; rollouts join.

    Between the rollouts the encoder learns: who stands still is not paid for that.
    """
    args = make_args(entropy, entropy_buffer_size=3, entropy_scale=0.9, num_steps=10)
    learner, buffer, slow = make_learner(entropy, args), None, None
    dones = torch.zeros(10, 4, dtype=torch.bool)
    dones[4, 0] = dones[9, 1] = dones[0, 2] = dones[7, 2] = True  # game 3 goes on
    rollouts = [make_rollout(entropy, dones, dones, torch.tensor([True] * 4))]
    rollouts.append(make_rollout(entropy, dones.roll(2, 0), dones.roll(2, 0), ~dones[9], seed=1))
    rollouts[1].obs[0] = rollouts[0].obs[-1]
    none = torch.zeros_like(dones)
    rollouts.append(make_rollout(entropy, none, none, ~dones[7], seed=2))
    rollouts[2].obs[0] = rollouts[1].obs[-1]
    rollouts[1].obs[8:, 3] = rollouts[2].obs[:, 3] = rollouts[1].obs[7, 3]  # game 3 stands still
    torch.manual_seed(4)
    for rollout in rollouts:
        rewards, buffer = entropy.state_entropy_rewards(learner, rollout, buffer, args)
        features = [learner.encoder(obs.float() / 256) for obs in rollout.obs]
        slow = slow or SlowBuffer(3, features[0])
        slow.rebase(features[0])
        for t in range(10):
            expected = (0.9 * slow.push(features[t + 1], ~rollout.valid[t]).mean(dim=1)).clamp(0, 1)
            assert (rewards[t][~rollout.valid[t]] == 0).all()
            torch.testing.assert_close(rewards[t].double(), expected, atol=1e-4, rtol=0)
        for parameter in learner.encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert rewards[:, 3].max() < 1e-3 < 0.1 < rewards[:, :3].mean() and rewards.max() < 1


def test_entropy_reward_is_clipped() -> None:
    """A large scale ends at 1."""
    args = make_args(entropy, entropy_scale=1e6)
    none = torch.zeros(8, 4, dtype=torch.bool)
    rollout = make_rollout(entropy, none, none, ~none[0])
    rewards, _ = entropy.state_entropy_rewards(make_learner(entropy, args), rollout, None, args)
    assert (rewards == 1).all()


def test_entropy_flags() -> None:
    """--entropy-coef 0 trains no third value head; the others do."""
    args = make_args(entropy, entropy_coef=0.0)
    none = torch.zeros(8, 4, dtype=torch.bool)
    rollout = make_rollout(entropy, none, none, ~none[0])
    learner = make_learner(entropy, args)
    before = learner.agent.values.weight.detach().clone()
    rewards = entropy.intrinsic_rewards(learner, rollout, args)
    inputs = entropy.estimate_advantages(rollout, rewards, torch.rand(8, 4), args)
    entropy.update(learner, rollout, *inputs, args)
    changed = (learner.agent.values.weight != before).any(dim=1)
    assert changed.tolist() == [True, True, False]
