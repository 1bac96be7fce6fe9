"""Advantages against a slow reference, what reset rows may not do, and rollouts of the real emulators."""

import random
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    BACKENDS,
    RND,
    Recorder,
    empty_obs,
    make_args,
    make_learner,
    make_rollout,
    num_heads,
    random_rollout,
    reward_and_estimate,
)

NUM_STEPS = 12
# Where an episode ends (row, terminated) in each environment: nowhere; for good; truncated; twice, once each; in the
# last row, for good and truncated; in the first row; just before the last row, so that the last row is a reset row.
ENDS = [[], [(5, True)], [(5, False)], [(3, False), (8, True)], [(11, True)], [(11, False)], [(0, True)], [(10, False)]]


def crossing_rollout(script: ModuleType) -> object:
    """Every kind of end, in an environment that begins with experience and in one that begins with a reset row."""
    num_envs = 2 * len(ENDS)
    dones = torch.zeros(NUM_STEPS, num_envs, dtype=torch.bool)
    terminations = dones.clone()
    for i, ends in enumerate(ENDS + ENDS):
        for t, terminated in ends:
            if t > 0 or i < len(ENDS):  # a reset row ends nothing
                dones[t, i], terminations[t, i] = True, terminated
    return make_rollout(script, dones, terminations, torch.arange(num_envs) < len(ENDS))


def slow_advantage(
    rewards: np.ndarray, values: np.ndarray, terminated: np.ndarray, done: np.ndarray, gamma: float, lam: float, t: int
) -> float:
    """One row of one environment: the lambda-weighted mean of all n-step returns up to the end, minus the value.

    An n-step return sums n discounted rewards and the discounted value of the state that follows, unless the episode
    ended for good there. The longest return gets all the weight that is left.
    """
    last = next((row for row in range(t, len(rewards)) if done[row]), len(rewards) - 1)
    estimate, length = 0.0, last - t + 1
    for n in range(1, length + 1):
        n_step = sum(gamma**k * rewards[t + k] for k in range(n))
        n_step += 0.0 if terminated[t + n - 1] else gamma**n * values[t + n]
        estimate += n_step * (lam ** (n - 1) if n == length else (1 - lam) * lam ** (n - 1))
    return estimate - values[t]


def slow_advantages(rewards: torch.Tensor, values: torch.Tensor, ends: tuple, gamma: float, lam: float) -> np.ndarray:
    """`slow_advantage` of every row."""
    rewards, values = rewards.double().numpy(), values.double().numpy()
    terminated, done = (end.numpy() for end in ends)
    result = np.zeros_like(rewards)
    for i in range(rewards.shape[1]):
        for t in range(len(rewards)):
            stream = rewards[:, i], values[:, i], terminated[:, i], done[:, i]
            result[t, i] = slow_advantage(*stream, gamma, lam, t)
    return result


def intrinsic(rollout: object, seed: int) -> torch.Tensor:
    """Intrinsic rewards of a rollout, 0 on its reset rows."""
    return torch.rand(rollout.valid.shape, generator=torch.Generator().manual_seed(seed)) * rollout.valid


def test_gae_with_ends(script: ModuleType) -> None:
    """Ended, truncated and edge-crossing episodes, on every row that is experience."""
    rollout = crossing_rollout(script)
    ends = rollout.terminations, rollout.dones
    advantages = script.gae(rollout.ext_rewards, rollout.values[..., 0], *ends, 0.9, 0.8).numpy()
    expected = slow_advantages(rollout.ext_rewards, rollout.values[..., 0], ends, 0.9, 0.8)
    valid = rollout.valid.numpy()
    np.testing.assert_allclose(advantages[valid], expected[valid], atol=1e-5)


def test_gae_without_ends(script: ModuleType) -> None:
    """A non-episodic stream flows through the reset rows: they earn nothing and hand on the next row's value."""
    rollout = crossing_rollout(script)
    rewards, no_ends = intrinsic(rollout, 1), (torch.zeros_like(rollout.dones),) * 2
    advantages = script.gae(rewards, rollout.values[..., 1], *no_ends, 0.9, 0.8)
    expected = slow_advantages(rewards, rollout.values[..., 1], no_ends, 0.9, 0.8)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-5)


def test_last_row_is_bootstrapped(script: ModuleType) -> None:
    """The last row's advantage holds the value of the observation after it, unless the episode ended for good there."""
    rewards, values = torch.ones(3, 3), torch.full((4, 3), 5.0)
    dones = torch.tensor([[False] * 3, [False] * 3, [False, True, True]])
    terminations = torch.tensor([[False] * 3, [False] * 3, [False, False, True]])
    advantages = script.gae(rewards, values, terminations, dones, 0.9, 0.95)
    torch.testing.assert_close(advantages[-1], torch.tensor([1 + 4.5 - 5, 1 + 4.5 - 5, 1 - 5.0]))


@pytest.mark.parametrize("int_episodic", [False, True])
def test_estimate_advantages(script: ModuleType, int_episodic: bool) -> None:
    """Each stream with its own discount, ends and coefficient; returns are advantages plus values."""
    coefs, gammas = [2.0, 1.0, 0.3], [0.99, 0.9, 0.8]
    args = make_args(
        script, int_episodic=int_episodic, gamma=gammas[0], int_gamma=gammas[1], ext_coef=coefs[0], int_coef=coefs[1]
    )
    args.gae_lambda = 0.7
    if num_heads(script) == 3:
        args.entropy_gamma, args.entropy_coef = gammas[2], coefs[2]
    rollout = crossing_rollout(script)
    streams = [rollout.ext_rewards, *(intrinsic(rollout, head) for head in range(1, num_heads(script)))]
    advantages, returns = script.estimate_advantages(rollout, *streams[1:], args)
    ends, no_ends = (rollout.terminations, rollout.dones), (torch.zeros_like(rollout.dones),) * 2
    valid, total = rollout.valid.numpy(), 0.0
    for head, rewards in enumerate(streams):
        stream_ends = ends if head == 0 or int_episodic else no_ends
        expected = slow_advantages(rewards, rollout.values[..., head], stream_ends, gammas[head], args.gae_lambda)
        head_returns = expected + rollout.values[:-1, :, head].numpy()
        np.testing.assert_allclose(returns[..., head].numpy()[valid], head_returns[valid], atol=1e-5)
        total = total + coefs[head] * expected
    np.testing.assert_allclose(advantages.numpy()[valid], total[valid], atol=1e-5)
    assert returns.shape == (*valid.shape, num_heads(script))


def test_reset_rows_get_no_intrinsic_reward(script: ModuleType) -> None:
    """Intrinsic and entropy reward of reset rows are 0, and only theirs."""
    args, rollout = make_args(script), random_rollout(script, 8, 4)
    learner = make_learner(script, args)
    assert 0 < len(rollout.valid_inds) < rollout.valid.numel()
    script.update_obs_stats(learner.obs_stats, rollout.obs[:-1].flatten(0, 1), rollout.valid_inds)
    rewards = script.intrinsic_rewards(learner, rollout, args)
    rewards = rewards[0] if script.__name__ == RND else rewards
    assert (rewards[~rollout.valid] == 0).all() and (rewards[rollout.valid] > 0).all()
    if num_heads(script) == 3:
        rewards, _ = script.state_entropy_rewards(learner, rollout, None, args)
        assert (rewards[~rollout.valid] == 0).all() and (rewards[rollout.valid] > 0).all()


def test_reset_rows_have_no_gradient(script: ModuleType) -> None:
    """Neither loss reaches the networks through a reset row, whatever stands in it."""
    generator = torch.Generator().manual_seed(0)
    valid, heads = torch.rand(40, generator=generator) < 0.7, num_heads(script)
    logits = torch.randn(40, 4, generator=generator, requires_grad=True)
    values = torch.randn(40, heads, generator=generator, requires_grad=True)
    actions, old_logprobs = torch.randint(4, (40,), generator=generator), torch.full((40,), -1.4)
    advantages, returns = torch.randn(40, generator=generator), torch.randn(40, heads, generator=generator)

    def losses() -> list[torch.Tensor]:
        experience = actions, old_logprobs, advantages, returns, valid
        return script.ppo_loss(logits, values, *experience, torch.ones(heads), make_args(script))

    loss, stats = losses()
    loss.backward()
    for gradient in (logits.grad, values.grad):
        assert (gradient[~valid] == 0).all() and (gradient[valid] != 0).any(dim=1).all()
    advantages[~valid], returns[~valid] = 1e6, -1e6
    other_loss, other_stats = losses()
    assert other_loss == loss and (other_stats == stats).all()

    target, predictor = torch.randn(40, 512), torch.randn(40, 512, requires_grad=True)
    script.distillation_loss(predictor, target, valid, 0.5).backward()
    assert (predictor.grad[~valid] == 0).all() and (predictor.grad[valid] != 0).any(dim=1).all()


def test_update_ignores_reset_rows(script: ModuleType) -> None:
    """Other actions, probabilities, advantages and returns in the reset rows lead to the same weights."""
    args, rollout = make_args(script), random_rollout(script, 8, 4)
    learner = make_learner(script, args)
    (advantages, returns, *extra), _ = reward_and_estimate(script, learner, rollout, args)

    def train() -> dict[str, torch.Tensor]:
        learner = make_learner(script, args)
        torch.manual_seed(5)
        script.update(learner, rollout, advantages, returns, *extra, args)
        return learner.agent.state_dict() | learner.predictor.state_dict()

    before = train()
    reset = ~rollout.valid
    rollout.actions[reset], rollout.logprobs[reset], advantages[reset], returns[reset] = 3, -9.0, 50.0, 70.0
    after = train()
    assert all(torch.equal(before[name], after[name]) for name in before)
    advantages[rollout.valid] += 1
    other = train()
    assert not all(torch.equal(before[name], other[name]) for name in before)


@pytest.fixture(scope="module", params=BACKENDS)
def played(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Two consecutive rollouts of real Breakout in which games end and episodes are truncated, and their record."""
    import ppo_snd_atari as snd

    args = make_args(snd, env_backend=request.param, num_steps=48, episodic_life=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snd, "MAX_EPISODE_STEPS", 60)
        record = Recorder(snd, args, seed=3)
        learner, obs = make_learner(snd, args), empty_obs(args)
        passes = []
        learner.agent.register_forward_hook(lambda *_: passes.append(1))
        rollouts, counts, outputs = [], [], []
        random.seed(0)
        for _ in range(2):
            rollout = snd.collect_rollout(record.envs, learner, obs, args)
            counts.append(len(passes))
            with torch.no_grad():
                outputs.append(learner.agent(obs.flatten(0, 1)))
            passes.clear()
            rollouts.append(snd.Rollout(**{name: value.clone() for name, value in vars(rollout).items()}))
        record.envs.close()
    return SimpleNamespace(args=args, record=record, rollouts=rollouts, passes=counts, outputs=outputs)


def test_rollout_has_every_kind_of_row(played: SimpleNamespace) -> None:
    """The play that the next tests look at has terminations, truncations, reset rows and rewards."""
    for condition in (
        lambda rollout: rollout.terminations,
        lambda rollout: rollout.dones & ~rollout.terminations,
        lambda rollout: ~rollout.valid,
        lambda rollout: rollout.ext_rewards > 0,
    ):
        assert any(condition(rollout).any() for rollout in played.rollouts)


def test_rollout_matches_the_emulators(played: SimpleNamespace) -> None:
    """Row t holds what the emulators showed before step t and returned for it; rollouts follow without a gap."""
    obs, dones = np.stack(played.record.obs), np.stack(played.record.dones)
    rewards, terminations = np.stack(played.record.rewards), np.stack(played.record.terminations)
    steps = played.args.num_steps
    for i, rollout in enumerate(played.rollouts):
        rows = slice(i * steps, (i + 1) * steps)
        assert np.array_equal(rollout.obs.numpy(), obs[i * steps : (i + 1) * steps + 1])
        assert np.array_equal(rollout.valid.numpy(), ~dones[:-1][rows])
        assert np.array_equal(rollout.dones.numpy(), dones[1:][rows])
        assert np.array_equal(rollout.terminations.numpy(), terminations[rows])
        assert np.array_equal(rollout.ext_rewards.numpy(), np.sign(rewards[rows]))
        assert np.array_equal(rollout.valid_inds.numpy(), np.flatnonzero(rollout.valid.numpy()))
        assert rollout.obs.dtype == torch.uint8
    assert (rewards[np.stack(played.record.dones[:-1])] == 0).all()  # a reset row pays nothing


def test_rollout_values_and_logprobs(played: SimpleNamespace) -> None:
    """Stored values, the one after the last row too, and log-probabilities are those of the policy; one pass a step."""
    for rollout, passes, (logits, values) in zip(played.rollouts, played.passes, played.outputs, strict=True):
        assert passes == played.args.num_steps + 1
        torch.testing.assert_close(rollout.values.flatten(0, 1), values, atol=1e-6, rtol=1e-4)
        logits = logits.view(*rollout.values.shape[:2], -1)[:-1]
        expected = torch.distributions.Categorical(logits=logits).log_prob(rollout.actions)
        torch.testing.assert_close(rollout.logprobs, expected, atol=1e-6, rtol=1e-5)


def test_actions_follow_the_policy(snd: ModuleType) -> None:
    """With a policy of known probabilities the actions come in those shares."""
    args = make_args(snd, num_envs=8, num_steps=100)
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    envs, learner = snd.AtariEnvs(args, 1), make_learner(snd, args)
    with torch.no_grad():
        learner.agent.actor[-1].weight.zero_()
        learner.agent.actor[-1].bias.copy_(probabilities.log())
    random.seed(0)
    rollout = snd.collect_rollout(envs, learner, empty_obs(args), args)
    shares = rollout.actions.flatten().bincount(minlength=4) / 800
    assert ((shares - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 800).sqrt()).all()
    torch.testing.assert_close(rollout.logprobs, probabilities.log()[rollout.actions], atol=1e-5, rtol=0)
