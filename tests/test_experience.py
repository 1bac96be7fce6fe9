"""Advantages against a slow reference, what reset rows may not do, and rollouts of the real emulators."""

from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    BACKENDS,
    ENTROPY,
    SND,
    Recorder,
    make_args,
    make_learner,
    make_rollout,
    random_rollout,
    reward_and_estimate,
    update,
)

import ppo_snd_atari as snd

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


def slow_returns(rewards: torch.Tensor, values: torch.Tensor, ends: tuple, gamma: float, lam: float) -> np.ndarray:
    """For every row the lambda-weighted mean of all n-step returns up to the end.

    An n-step return sums n discounted rewards and the discounted value of the state that follows, unless the episode
    ended for good there. The longest return gets all the weight that is left.
    """
    rewards, values, terminated, done = (x.double().numpy() for x in (rewards, values, *ends))
    result = np.zeros(rewards.shape)
    for t, i in np.ndindex(*rewards.shape):
        length = next((n for n, end in enumerate(done[t:, i], start=1) if end), NUM_STEPS - t)
        for n in range(1, length + 1):
            n_step = gamma ** np.arange(n) @ rewards[t : t + n, i]
            n_step += (1 - terminated[t + n - 1, i]) * gamma**n * values[t + n, i]
            result[t, i] += n_step * lam ** (n - 1) * (1 if n == length else 1 - lam)
    return result


@pytest.mark.parametrize("script", [SND, ENTROPY], indirect=True)
@pytest.mark.parametrize("int_episodic", [False, True])
def test_estimate_advantages(script: ModuleType, int_episodic: bool):
    """Each stream with its own discount, ends and coefficient; returns are advantages plus values.

    Without ends a stream flows through the reset rows: they earn nothing and hand on the next row's value.
    """
    coefs, gammas = [2.0, 0.7, 0.3][: 3 if script.__name__ == ENTROPY else 2], [0.99, 0.9, 0.8]
    names = dict(gamma=gammas[0], int_gamma=gammas[1], ext_coef=coefs[0], int_coef=coefs[1], gae_lambda=0.7)
    if script.__name__ == ENTROPY:
        names |= dict(entropy_gamma=gammas[2], entropy_coef=coefs[2])
    args, rollout = make_args(script, int_episodic=int_episodic, **names), crossing_rollout(script)
    torch.manual_seed(0)
    streams = [rollout.ext_rewards, *(torch.rand(rollout.valid.shape) * rollout.valid for _ in coefs[1:])]
    advantages, returns = script.estimate_advantages(rollout, *streams[1:], args)
    ends, no_ends = (rollout.terminations, rollout.dones), (torch.zeros_like(rollout.dones),) * 2
    valid, total = rollout.valid.numpy(), 0.0
    for head, rewards in enumerate(streams):
        stream_ends = ends if head == 0 or int_episodic else no_ends
        expected = slow_returns(rewards, rollout.values[..., head], stream_ends, gammas[head], 0.7)
        compared = valid if stream_ends is ends else np.ones_like(valid)
        np.testing.assert_allclose(returns[..., head].numpy()[compared], expected[compared], atol=1e-5)
        total = total + coefs[head] * (expected - rollout.values[:-1, :, head].numpy())
    np.testing.assert_allclose(advantages.numpy()[valid], total[valid], atol=1e-5)
    assert returns.shape == (*valid.shape, len(coefs))

    weighted, values = (returns.double().numpy() @ coefs)[valid], (rollout.values[:-1].double().numpy() @ coefs)[valid]
    explained = script.explained_variance(rollout, advantages, returns, args).item()
    np.testing.assert_allclose(explained, 1 - np.var(weighted - values) / np.var(weighted), rtol=1e-3)


def test_update_ignores_reset_rows(script: ModuleType):
    """They earn no novelty, and what else stands in them leads to the same weights; what stands elsewhere does not."""
    args, rollout = make_args(script), random_rollout(script)
    learner = make_learner(script, args)
    (novelty, *_), inputs = reward_and_estimate(script, learner, rollout, args)
    assert torch.equal(novelty > 0, rollout.valid)

    def trained() -> dict[str, torch.Tensor]:
        learner = make_learner(script, args)
        torch.manual_seed(5)
        update(script, learner, rollout, inputs, args)
        return learner.state_dict()

    before, reset = trained(), ~rollout.valid
    advantages, returns = inputs[:2]
    rollout.obs[:-1][reset], rollout.actions[reset], rollout.logprobs[reset] = 0, 3, -9.0
    advantages[reset], returns[reset] = 50.0, 70.0
    after = trained()
    assert reset.any() and all(torch.equal(before[name], after[name]) for name in before)
    advantages[rollout.valid] += 1
    assert any(not torch.equal(before[name], value) for name, value in trained().items())


@pytest.fixture(scope="module", params=BACKENDS)
def played(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Two consecutive rollouts of Asterix in which lives are lost and episodes truncated, and their record."""
    args = make_args(snd, env_id="Asterix-v5", env_backend=request.param, num_steps=64, episodic_life=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snd, "MAX_EPISODE_STEPS", 100)
        record = Recorder(snd, args, seed=3)
        learner, passes, rollouts = make_learner(snd, args, 9), [], []
        obs = torch.zeros(65, 4, 4, 96, 96, dtype=torch.uint8)
        learner.agent.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].dtype))
        torch.manual_seed(0)
        for _ in range(2):
            rollout = snd.collect_rollout(record.envs, partial(snd.act, learner, args), obs, args)
            rollouts.append(snd.Rollout(**{name: value.clone() for name, value in vars(rollout).items()}))
        with torch.no_grad():
            outputs = [learner.agent(rollout.obs.flatten(0, 1)) for rollout in rollouts]
    return SimpleNamespace(record=record.stack(), rollouts=rollouts, passes=passes[:-2], outputs=outputs)


def test_rollout_matches_the_emulators(played: SimpleNamespace):
    """Row t holds what the emulators showed before step t and returned for it; rollouts follow without a gap."""
    record = played.record
    valid, truncations = ~record.resets[:-1], record.dones & ~record.terminations
    shown = dict(valid=valid, dones=record.dones, terminations=record.terminations, ext_rewards=np.sign(record.rewards))
    for rollout, start in zip(played.rollouts, (0, 64), strict=True):
        assert np.array_equal(rollout.obs.numpy(), record.obs[start : start + 65])
        for name, rows in shown.items():
            assert np.array_equal(getattr(rollout, name).numpy(), rows[start : start + 64]), name
        assert np.array_equal(rollout.valid_inds.numpy(), np.flatnonzero(rollout.valid.numpy()))
        assert rollout.obs.dtype == torch.uint8 and rollout.ext_rewards.dtype == torch.float32
    assert (record.rewards[~valid] == 0).all() and record.rewards.max() > 1
    assert record.terminations.any() and truncations.any() and not valid.all()  # the play had every kind of row


def test_rollout_values_and_logprobs(played: SimpleNamespace):
    """Those of the policy, values also after the last row; one pass a step, of bytes."""
    assert played.passes == [torch.uint8] * 2 * 65
    for rollout, (logits, values) in zip(played.rollouts, played.outputs, strict=True):
        torch.testing.assert_close(rollout.values.flatten(0, 1), values, atol=1e-6, rtol=1e-4)
        logits = logits.view(*rollout.values.shape[:2], -1)[:-1]
        expected = torch.distributions.Categorical(logits=logits).log_prob(rollout.actions)
        torch.testing.assert_close(rollout.logprobs, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_actions_follow_the_policy():
    """With a policy of known probabilities the actions come in those shares."""
    args, probabilities = make_args(snd), torch.tensor([0.1, 0.2, 0.3, 0.4])
    learner = make_learner(snd, args)
    learner.agent.logits.weight.zero_()
    learner.agent.logits.bias.copy_(probabilities.log())
    torch.manual_seed(0)
    chosen = snd.act(learner, args, torch.zeros(2000, 4, 96, 96, dtype=torch.uint8))
    shares = chosen["actions"].bincount(minlength=4) / 2000
    assert ((shares - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 2000).sqrt()).all()
    torch.testing.assert_close(chosen["logprobs"], probabilities.log()[chosen["actions"]], atol=1e-5, rtol=0)
