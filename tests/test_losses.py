"""The losses and rewards against independent references, and the random parts by their rates and ranges."""

import importlib
import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import (
    RND,
    empty_obs,
    make_args,
    make_learner,
    make_rollout,
    num_heads,
    random_rollout,
    reward_and_estimate,
    train,
)


def experience(heads: int) -> dict[str, torch.Tensor]:
    """A random minibatch of 64 rows with reset rows in it and ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5, generator=generator)
    actions = torch.randint(5, (64,), generator=generator)
    logprobs = logits.log_softmax(dim=1).gather(1, actions[:, None])[:, 0]
    return dict(
        logits=logits,
        values=torch.randn(64, heads, generator=generator),
        actions=actions,
        old_logprobs=logprobs + 0.2 * torch.randn(64, generator=generator),
        advantages=torch.randn(64, generator=generator),
        returns=torch.randn(64, heads, generator=generator),
        valid=torch.rand(64, generator=generator) < 0.8,
    )


def test_ppo_loss_values(script: ModuleType) -> None:
    """Loss and statistics against numpy, row by row in float64."""
    batch, args = experience(num_heads(script)), make_args(script)
    loss, stats = script.ppo_loss(*batch.values(), torch.ones(num_heads(script)), args)
    rows = {name: value.numpy().astype(np.float64) for name, value in batch.items()}
    policy, value, entropy, kl, clipped = [], [], [], [], []
    for i in np.flatnonzero(batch["valid"].numpy()):
        probabilities = np.exp(rows["logits"][i]) / np.exp(rows["logits"][i]).sum()
        ratio = probabilities[batch["actions"][i]] / np.exp(rows["old_logprobs"][i])
        advantage = rows["advantages"][i]
        policy.append(-min(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage))
        value.append(((rows["values"][i] - rows["returns"][i]) ** 2).sum())
        entropy.append(-(probabilities * np.log(probabilities)).sum())
        kl.append(ratio - 1 - np.log(ratio))
        clipped.append(not 0.9 <= ratio <= 1.1)
    means = [np.mean(values) for values in (policy, value, entropy, kl, clipped)]
    assert 0.1 < means[4] < 0.9
    np.testing.assert_allclose(stats.numpy(), means, rtol=1e-5)
    np.testing.assert_allclose(loss.item(), means[0] + 0.5 * means[1] - 0.001 * means[2], rtol=1e-5)
    assert not stats.requires_grad


def test_ppo_loss_gradients(script: ModuleType) -> None:
    """The gradient is that of the paper's formulas over the valid rows alone."""
    heads, args = num_heads(script), make_args(script, ent_coef=0.1, vf_coef=0.7, clip_coef=0.3)
    batch = experience(heads)
    logits, values = batch["logits"].requires_grad_(), batch["values"].requires_grad_()
    loss, _ = script.ppo_loss(*batch.values(), torch.ones(heads), args)
    gradients = torch.autograd.grad(loss, [logits, values])

    keep = batch["valid"]
    policy = torch.distributions.Categorical(logits=logits.double()[keep])
    ratio = torch.exp(policy.log_prob(batch["actions"][keep]) - batch["old_logprobs"][keep])
    advantages = batch["advantages"][keep].double()
    objective = torch.min(ratio * advantages, torch.clip(ratio, 0.7, 1.3) * advantages).mean()
    errors = [torch.nn.functional.mse_loss(values[keep, i], batch["returns"][keep, i]) for i in range(heads)]
    expected = torch.autograd.grad(-objective + 0.7 * sum(errors) - 0.1 * policy.entropy().mean(), [logits, values])
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-7, rtol=1e-4)


def test_untrained_value_heads(script: ModuleType) -> None:
    """A head that does not learn gets no gradient and adds nothing to the loss."""
    heads, args = num_heads(script), make_args(script)
    batch = experience(heads)
    values = batch["values"].requires_grad_()
    trained = torch.tensor([False] + [True] * (heads - 1))
    loss, stats = script.ppo_loss(*batch.values(), trained, args)
    loss.backward()
    assert (values.grad[:, 0] == 0).all() and (values.grad[batch["valid"], 1:] != 0).all()
    expected = (values - batch["returns"])[batch["valid"], 1:].square().sum(dim=1).mean()
    torch.testing.assert_close(stats[1], expected.detach())


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_distillation_loss(script: ModuleType, share: float) -> None:
    """The mean squared error of the kept elements, which are a random share of the elements of the valid rows."""
    torch.manual_seed(1)
    target, valid = torch.randn(200, 512), torch.rand(200) < 0.7
    predictor = torch.randn(200, 512, requires_grad=True)
    loss = script.distillation_loss(predictor, target, valid, share)
    loss.backward()
    kept = predictor.grad != 0
    assert not kept[~valid].any()
    count = int(valid.sum()) * 512
    assert abs(kept.sum().item() / count - share) <= 4 * (share * (1 - share) / count) ** 0.5
    rows = kept[valid].float().mean(dim=1)
    assert share == 1 or 0 < rows.std() < 0.03  # elements are drawn, not whole rows
    errors = (predictor - target)[kept].detach().double()
    np.testing.assert_allclose(loss.item(), (errors**2).mean().item(), rtol=1e-5)
    torch.testing.assert_close(predictor.grad[kept].double(), 2 * errors / len(errors), atol=1e-10, rtol=1e-4)


def test_distillation_loss_of_reset_rows_only(script: ModuleType) -> None:
    """Nothing to learn from is a loss of 0, not a division by it."""
    features = torch.randn(4, 512)
    assert script.distillation_loss(features, features + 1, torch.zeros(4, dtype=torch.bool), 0.25) == 0


@pytest.mark.parametrize(("num_envs", "share"), [(4, 1.0), (40, 0.8), (128, 0.25)])
def test_default_update_proportion(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, num_envs: int, share: float
) -> None:
    """min(1, 32 / num_envs) unless the flag says otherwise."""
    given = []

    def record(*inputs: object) -> torch.Tensor:
        given.append(inputs[3])
        return distillation_loss(*inputs)

    distillation_loss = script.distillation_loss
    monkeypatch.setattr(script, "distillation_loss", record)
    args = make_args(script, num_envs=num_envs, num_steps=1, num_minibatches=1)
    learner = make_learner(script, make_args(script))
    learner.int_returns = script.DiscountedReturns(num_envs)
    rollout = random_rollout(script, 1, num_envs)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    script.update(learner, rollout, *inputs, args)
    args.update_proportion = 0.5
    script.update(learner, rollout, *inputs, args)
    assert given == [share, 0.5]


def test_contrastive_loss(snd_script: ModuleType) -> None:
    """Pair by pair in numpy."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(0, 0.7, (20, 512)), rng.integers(0, 2, 10)
    errors = [(labels[i] - ((features[i] - features[10 + i]) ** 2).mean()) ** 2 for i in range(10)]
    loss = snd_script.contrastive_loss(torch.from_numpy(features).float(), torch.from_numpy(labels).float())
    np.testing.assert_allclose(loss.item(), np.mean(errors), rtol=1e-5)


def test_draw_pairs(snd_script: ModuleType) -> None:
    """Half the labels are 1; label 0 is the same row, label 1 any other; reset rows are never drawn."""
    torch.manual_seed(0)
    valid_inds, num_pairs = torch.tensor([3, 5, 6, 10, 11, 12, 20, 21, 30, 31]), 40_000
    rows, labels = snd_script.draw_pairs(valid_inds, 4, num_pairs // 4)
    assert rows.shape == (4, num_pairs // 2) and labels.shape == (4, num_pairs // 4) and labels.dtype == torch.float32
    assert set(rows.flatten().tolist()) == set(valid_inds.tolist())
    a, b = (half.flatten() for half in rows.chunk(2, dim=1))
    labels = labels.flatten()
    assert torch.equal(a != b, labels == 1)
    assert abs(labels.mean().item() - 0.5) < 4 * 0.5 / num_pairs**0.5
    for row in valid_inds:
        assert abs((a == row).float().mean().item() - 0.1) < 4 * (0.09 / num_pairs) ** 0.5
        others = b[(a == row) & (labels == 1)]
        shares = torch.stack([(others == other).float().mean() for other in valid_inds if other != row])
        assert ((shares - 1 / 9).abs() < 5 * (8 / 81 / len(others)) ** 0.5).all()


def test_update_draws_64_pairs_of_valid_rows(snd_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw of 64 pairs a minibatch, never from the reset rows."""
    drawn, draw_pairs = [], snd_script.draw_pairs

    def record(*inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(draw_pairs(*inputs))
        return drawn[-1]

    monkeypatch.setattr(snd_script, "draw_pairs", record)
    args, rollout = make_args(snd_script, update_epochs=2), random_rollout(snd_script, 8, 4)
    learner = make_learner(snd_script, args)
    inputs, _ = reward_and_estimate(snd_script, learner, rollout, args)
    snd_script.update(learner, rollout, *inputs, args)
    assert [labels.shape for _, labels in drawn] == [(2 * args.num_minibatches, 64)]
    assert rollout.valid.flatten()[torch.cat([rows for rows, _ in drawn])].all()
    assert not rollout.valid.all()


@pytest.fixture(scope="module", params=["ppo_snd_atari", "ppo_snd_entropy_atari"])
def augmented(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """4,000 frames of 24 × 24 whole numbers from 100 to 200, before and after augmentation."""
    script = __import__(request.param)
    torch.manual_seed(0)
    x = torch.randint(100, 201, (4000, 1, 24, 24)).float()
    return x[:, 0].double().numpy(), script.augment(x)[:, 0].double().numpy()


def blocks(x: np.ndarray, size: int) -> np.ndarray:
    """(samples, 24, 24) -> (samples, blocks, size * size)."""
    n = 24 // size
    return x.reshape(-1, n, size, n, size).transpose(0, 1, 3, 2, 4).reshape(len(x), n * n, size * size)


def pooled(x: np.ndarray, size: int) -> np.ndarray:
    """Every block replaced by its mean."""
    means = blocks(x, size).mean(axis=2).reshape(-1, 24 // size, 24 // size)
    return means.repeat(size, axis=1).repeat(size, axis=2)


def near(share: float, expected: float, samples: int) -> bool:
    """Within 4.5 standard errors of a share."""
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / samples) ** 0.5


def views(augmented: tuple[np.ndarray, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """What each sample could have become, which one it became (bool masks), and which pixels were dropped."""
    x, y = augmented
    dropped = np.abs(y) < 1  # nothing else is near 0
    candidates = {"plain": x, "half": pooled(x, 2), "quarter": pooled(x, 4)}
    matches = {
        name: (np.where(dropped, 0, np.abs(y - candidate)) <= 0.2001).all(axis=(1, 2))
        for name, candidate in candidates.items()
    }
    return candidates, matches, dropped


def test_augment_pooling(augmented: tuple[np.ndarray, np.ndarray]) -> None:
    """2 × 2 means with probability 1/2, then 4 × 4 means with 1/4; every sample is one of the three."""
    _, matches, _ = views(augmented)
    assert (sum(mask.astype(int) for mask in matches.values()) == 1).all()
    assert near(matches["quarter"].mean(), 1 / 4, 4000)
    assert near(matches["half"].mean(), 1 / 2 * 3 / 4, 4000)
    assert near(matches["plain"].mean(), 1 / 2 * 3 / 4, 4000)


def test_augment_dropout(augmented: tuple[np.ndarray, np.ndarray]) -> None:
    """An eighth of the samples, whatever else happened to them, loses a tenth of its single pixels, after pooling."""
    _, matches, dropped = views(augmented)
    hit = dropped.any(axis=(1, 2))
    assert near(hit.mean(), 1 / 8, 4000)
    assert near(hit[matches["quarter"]].mean(), 1 / 8, matches["quarter"].sum())
    assert near(dropped[hit].mean(), 1 / 10, dropped[hit].size)
    both = (blocks(dropped[hit].astype(float), 2).sum(axis=2) >= 2).mean()  # of four independent pixels
    assert near(both, 1 - 0.9**4 - 4 * 0.1 * 0.9**3, hit.sum() * 144)


def test_augment_noise(augmented: tuple[np.ndarray, np.ndarray]) -> None:
    """Every pixel of every sample gets its own noise, uniform in ±0.2."""
    _, y = augmented
    candidates, matches, dropped = views(augmented)
    base = sum(np.where(matches[name][:, None, None], candidates[name], 0) for name in candidates)
    noise = y - np.where(dropped, 0, base)
    assert -0.2001 < noise.min() < -0.199 and 0.199 < noise.max() < 0.2001
    assert abs(noise.mean()) < 0.001 and abs(noise.std() - 0.4 / 12**0.5) < 0.001
    assert (noise.std(axis=(1, 2)) > 0.08).all() and (noise.std(axis=0) > 0.08).all()
    counts = np.histogram(noise, bins=8, range=(-0.2, 0.2))[0] / noise.size
    assert (np.abs(counts - 1 / 8) < 0.002).all()


def test_augment_views_differ(snd_script: ModuleType) -> None:
    """Samples are augmented on their own: copies of one state become different views; the shape stays."""
    torch.manual_seed(0)
    x = torch.rand(1, 4, 96, 96).expand(64, 4, 96, 96)
    y = snd_script.augment(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert not any(torch.equal(y[0], y[i]) for i in range(1, 64))
    assert len({round(view.var().item(), 3) for view in y}) > 3


def test_novelty(script: ModuleType) -> None:
    """Half the summed (RND) or scaled mean (SND) squared error of the 512 features, clipped to [0, 1]."""
    rng = np.random.default_rng(0)
    errors = rng.normal(0, 1, (6, 512)) * np.array([0, 0.001, 0.03, 0.05, 1, 3])[:, None]
    target = torch.from_numpy(rng.normal(0, 1, (6, 512))).float()
    squares = errors**2
    expected = 0.5 * (squares.sum(axis=1) if script.__name__ == RND else squares.mean(axis=1))
    reward = script.novelty(target, target + torch.from_numpy(errors).float(), 0.5)
    np.testing.assert_allclose(reward.numpy(), expected.clip(0, 1), rtol=1e-3, atol=1e-7)
    assert reward[-1] == 1 and expected[-1] > 1 and 0 < reward[1] < 1


def rewards_of(script: ModuleType, learner: object, rollout: object, args: object) -> torch.Tensor:
    """The intrinsic rewards of a rollout in any of the scripts."""
    rewards = script.intrinsic_rewards(learner, rollout, args)
    return rewards[0] if script.__name__ == RND else rewards


@torch.no_grad()
def test_intrinsic_reward_is_of_the_next_observation(script: ModuleType) -> None:
    """Row t is paid for the newest frame of obs[t + 1], also in the last row and where chunks meet."""
    num_steps, num_envs = 70, 4
    args, rollout = make_args(script, num_steps=num_steps), random_rollout(script, num_steps, num_envs)
    learner = make_learner(script, args)
    script.update_obs_stats(learner.obs_stats, rollout.obs.flatten(0, 1), torch.arange(num_envs * num_steps))
    args.int_reward_scale = 1e-3  # below the clip
    rewards = rewards_of(script, learner, rollout, args)
    for t in range(num_steps):
        x = script.novelty_input(rollout.obs[t + 1], learner.obs_stats, args.norm_obs)
        errors = (learner.target(x) - learner.predictor(x)).square()
        expected = 1e-3 * (errors.sum(dim=1) if script.__name__ == RND else errors.mean(dim=1))
        expected = expected.clamp(0, 1) * rollout.valid[t]
        torch.testing.assert_close(rewards[t], expected, atol=1e-6, rtol=1e-3)
    assert 0 < rewards[rollout.valid].max() < 1 or script.__name__ == RND


def test_norm_int_reward(script: ModuleType) -> None:
    """With the flag the reward is divided by the deviation of its discounted sum over time, and by nothing else."""
    args, rollout = make_args(script, int_reward_scale=1e-3), random_rollout(script, 8, 4)
    learner = make_learner(script, args)
    script.update_obs_stats(learner.obs_stats, rollout.obs.flatten(0, 1), rollout.valid_inds)
    plain = rewards_of(script, learner, rollout, args).double().numpy()
    args.norm_int_reward = True
    seen, sums = [], np.zeros(4)
    for _ in range(2):  # the sums go on from one rollout to the next
        for t in range(8):
            for i in range(4):
                if rollout.valid[t, i]:
                    sums[i] = args.int_gamma * sums[i] + plain[t, i]
                    seen.append(sums[i])
        rewards = rewards_of(script, learner, rollout, args)
        np.testing.assert_allclose(rewards.numpy(), plain / np.std(seen), rtol=1e-3)


def test_explained_variance(script: ModuleType) -> None:
    """1 - Var(returns - values) / Var(returns) of the weighted sum of the streams, over the valid rows."""
    args, rollout = make_args(script, ext_coef=2.0, int_coef=0.7), random_rollout(script, 8, 4)
    coefs = [2.0, 0.7, 1.3][: num_heads(script)]
    if len(coefs) == 3:
        args.entropy_coef = coefs[2]
    streams = [torch.rand(8, 4) * rollout.valid for _ in coefs[1:]]
    advantages, returns = script.estimate_advantages(rollout, *streams, args)
    valid = rollout.valid.numpy()
    y = (returns.double().numpy() @ coefs)[valid]
    values = (rollout.values[:-1].double().numpy() @ coefs)[valid]
    result = script.explained_variance(rollout, advantages, returns, args)
    np.testing.assert_allclose(result.item(), 1 - np.var(y - values, ddof=1) / np.var(y, ddof=1), rtol=1e-3)


def test_ext_coef_0_needs_no_rewards(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --ext-coef 0 no reward of the game reaches any weight."""
    check_influence_of_rewards(script, monkeypatch, 0.0)


def test_ext_coef_2_needs_rewards(snd: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a coefficient the rewards do reach the weights: the test above can tell the difference."""
    check_influence_of_rewards(snd, monkeypatch, 2.0)


def check_influence_of_rewards(script: ModuleType, monkeypatch: pytest.MonkeyPatch, ext_coef: float) -> None:
    """Train twice on the same games, paid and unpaid: the weights are bit-identical exactly if ext_coef is 0."""
    args = make_args(script, ext_coef=ext_coef, num_envs=4, num_steps=48)
    paid, wait = [], script.AtariEnvs.step_wait

    def weights() -> dict[str, torch.Tensor]:
        learner = train(script, args, iterations=2)
        modules = {name: part for name, part in vars(learner).items() if isinstance(part, torch.nn.Module)}
        return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}

    def recorded_wait(envs: object, group: int) -> tuple:
        rewards, *ends = wait(envs, group)
        paid.append(rewards.sum())
        return rewards, *ends

    def unpaid_wait(envs: object, group: int) -> tuple:
        rewards, *ends = wait(envs, group)
        return 0 * rewards, *ends

    monkeypatch.setattr(script.AtariEnvs, "step_wait", recorded_wait)
    with_rewards = weights()
    assert sum(paid[args.norm_init_steps :]) > 0  # the game did pay
    monkeypatch.setattr(script.AtariEnvs, "step_wait", unpaid_wait)
    without_rewards = weights()
    same = [torch.equal(with_rewards[name], without_rewards[name]) for name in with_rewards]
    assert all(same) if ext_coef == 0 else not all(same)


def test_update_trains_every_network(script: ModuleType) -> None:
    """One update changes every weight of a trained network and none of a frozen target; losses come back by name."""
    args, rollout = make_args(script), random_rollout(script, 8, 4)
    learner, before = make_learner(script, args), make_learner(script, args)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    losses, _ = script.update(learner, rollout, *inputs, args)
    assert list(losses) == script.POLICY_LOSSES + script.NOVELTY_LOSSES and all(np.isfinite(list(losses.values())))
    for name in ("agent", "target", "predictor", "encoder"):
        if hasattr(learner, name):
            pairs = zip(getattr(learner, name).parameters(), getattr(before, name).parameters(), strict=True)
            changed = {not torch.equal(new, old) for new, old in pairs}
            assert changed == {name != "target" or script.__name__ != RND}, name


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_idle_threads_end(snd: ModuleType) -> None:
    """And with new ones the same comes out."""
    before, x = torch.get_num_threads(), torch.randn(600, 600)
    torch.set_num_threads(3)
    try:
        product = x @ x
        busy = len(os.listdir("/proc/self/task"))
        snd.end_idle_threads()
        assert len(os.listdir("/proc/self/task")) <= busy - 2
        assert torch.equal(x @ x, product)
    finally:
        torch.set_num_threads(before)


def test_training_beside_a_rollout_is_training() -> None:
    """A minibatch after each step of the games, out of sight of the rollout's precision and its want of gradients."""
    script = importlib.import_module(RND)
    args = make_args(script, num_minibatches=4, num_steps=6, update_proportion=1, bf16=True)
    inds = torch.randperm(32).view(8, 4)  # two minibatches more than the rollout has steps
    rows = torch.randint(256, (32, 1, 96, 96), dtype=torch.uint8), torch.randn(32, 512), torch.rand(32) < 0.8
    envs, results = script.AtariEnvs(args, 1), []
    for beside in (False, True):
        learner, losses = make_learner(script, args), torch.zeros(1)
        training = script.train_novelty(learner, args, losses, inds, *rows)
        if beside:
            script.collect_rollout(envs, learner, empty_obs(args), args, training)
            steps = {state["step"].item() for state in learner.predictor_optimizer.state.values()}
            assert steps == {6}
        script.finish(training, torch.device("cpu"))
        results.append([losses, *learner.predictor.parameters()])
    assert results[0][0] > 0
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@torch.no_grad()
def test_take(script: ModuleType) -> None:
    """The rows of whole stacks and of newest frames alone, as an update takes them."""
    obs, inds = random_rollout(script, 8, 4).obs, torch.tensor([3, 31, 0, 3])
    for rows in (obs[:-1].flatten(0, 1), obs[:-1, :, -1:].flatten(0, 1), obs[:-1].flatten(0, 1)[:, -1:]):
        assert torch.equal(script.take(rows, inds), rows[inds])
    for rows in (torch.arange(32), torch.randn(32, 512)):  # what a copy of the script may take: actions, features
        assert torch.equal(script.take(rows, inds), rows[inds])


def test_a_loss_without_a_name_fails(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number too few or too many for NOVELTY_LOSSES, which a sum would spread over all names."""
    for count in (0, 2):
        losses = torch.zeros(len(script.NOVELTY_LOSSES) - 1 + count)
        monkeypatch.setattr(script, "novelty_step", lambda *inputs, losses=losses: losses)
        rollout = random_rollout(script, 8, 4)
        args = script.Args(num_envs=4, num_steps=8, num_minibatches=4)
        inds, obs, rest = torch.arange(32).view(4, 8), rollout.obs[:-1].flatten(0, 1), (rollout.valid.flatten(),)
        rest = (torch.zeros(32, 512), *rest) if script.__name__ == RND else (*rest, rollout.valid_inds)
        names = torch.zeros(len(script.NOVELTY_LOSSES))
        with pytest.raises(RuntimeError, match="shape"):
            next(script.train_novelty(None, args, names, inds, obs, *rest))


def test_update_keeps_frames_with_their_rows(script: ModuleType) -> None:
    """In a shuffled minibatch the first ratios are 1, and a distillation loss is that of each frame's own features."""
    args, rollout = make_args(script, num_minibatches=1, update_proportion=1), random_rollout(script, 8, 4)
    learner = make_learner(script, args)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    with torch.no_grad():
        learner.agent.actor[-1].weight *= 30_000  # so that frames differ in their probabilities
        logits = learner.agent(rollout.obs[:-1].flatten(0, 1))[0].log_softmax(dim=1)
        rollout.logprobs = logits.gather(1, rollout.actions.flatten()[:, None]).view_as(rollout.logprobs)
        frames = rollout.obs[:-1][rollout.valid]
        x = script.novelty_input(frames, learner.obs_stats, args.norm_obs)
        expected = (learner.predictor(x) - learner.target(x)).square().mean().item()
        assert logits.std(dim=0).max() > 0.1
    torch.manual_seed(0)
    losses, _ = script.update(learner, rollout, *inputs, args)
    assert losses["approx_kl"] < 1e-6 and losses["clipfrac"] == 0
    if script.__name__ == RND:  # SND's target has already learned when the predictor looks at it
        assert losses["distillation"].item() == pytest.approx(expected, rel=1e-4)


def test_update_sees_every_row_once_an_epoch(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The minibatches of an epoch are a shuffled partition of the rollout."""
    args = make_args(script, num_minibatches=4, update_epochs=3)
    dones = torch.zeros(8, 4, dtype=torch.bool)
    rollout = make_rollout(script, dones, dones, torch.ones(4, dtype=torch.bool))
    learner = make_learner(script, args)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    rollout.logprobs = -torch.arange(32.0).view(8, 4) / 100  # a name for each row
    seen, ppo_loss = [], script.ppo_loss

    def record(
        logits: torch.Tensor, values: torch.Tensor, actions: torch.Tensor, logprobs: torch.Tensor, *rest: object
    ):
        seen.append((logprobs * -100).round().int().tolist())
        return ppo_loss(logits, values, actions, logprobs, *rest)

    monkeypatch.setattr(script, "ppo_loss", record)
    script.update(learner, rollout, *inputs, args)
    assert [len(rows) for rows in seen] == [8] * 12
    epochs = [[row for rows in seen[start : start + 4] for row in rows] for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])


def test_empty_obs_is_uint8(snd: ModuleType) -> None:
    """Frames stay uint8 from the emulator to the minibatch: the agent is given nothing else."""
    args = make_args(snd)
    envs, learner = snd.AtariEnvs(args, 1), make_learner(snd, args)
    dtypes = []
    learner.agent.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    rollout = snd.collect_rollout(envs, learner, empty_obs(args), args)
    inputs, _ = reward_and_estimate(snd, learner, rollout, args)
    snd.update(learner, rollout, *inputs, args)
    assert rollout.obs.dtype == torch.uint8 and set(dtypes) == {torch.uint8}


def test_novelty_minibatches(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every newest frame once an epoch, with its own mask; a pair is twice one frame exactly where its label is 0."""
    args, rollout = make_args(script, num_minibatches=4, update_epochs=2), random_rollout(script, 8, 4)
    learner, steps = make_learner(script, args), []
    inputs, _ = reward_and_estimate(script, learner, rollout, args)

    def record(_learner: object, _args: object, *minibatch: torch.Tensor) -> torch.Tensor:
        steps.append(minibatch)
        return torch.full((len(script.NOVELTY_LOSSES),), float(len(steps)))

    monkeypatch.setattr(script, "novelty_step", record)
    losses, _ = script.update(learner, rollout, *inputs, args)
    assert all(losses[name] == 4.5 for name in script.NOVELTY_LOSSES)  # the mean of 1 to 8
    rows = {frame.numpy().tobytes(): row for row, frame in enumerate(rollout.obs[:-1, :, -1].flatten(0, 1))}
    inds, reset = [], ~rollout.valid.flatten()
    for *first, x, valid in steps:
        frames = first[0] if script.__name__ == RND else x
        inds += [rows[frame.numpy().tobytes()] for frame in frames[:, -1]]
        assert torch.equal(valid, ~reset[inds[-8:]])
        if script.__name__ == RND:
            assert torch.equal(x, inputs[2][inds[-8:]])  # the target's features
        else:
            pairs, labels = first
            assert torch.equal(torch.stack([(a == b).all() for a, b in zip(*pairs.chunk(2), strict=True)]), labels == 0)
            assert not reset[[rows[frame.numpy().tobytes()] for frame in pairs[:, -1]]].any()
    assert sorted(inds[:32]) == sorted(inds[32:]) == list(range(32)) and inds[:32] != inds[32:]


def test_contrastive_networks_see_augmented_frames(snd_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target views of normalised frames, the encoder of frames / 256; the losses are those before the step."""
    seen, augment = [], snd_script.augment

    def record(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), augment(x)))
        return seen[-1][1]

    monkeypatch.setattr(snd_script, "augment", record)
    args = make_args(snd_script)
    learner, before = make_learner(snd_script, args), make_learner(snd_script, args)
    frames, labels = torch.randint(256, (8, 4, 96, 96), dtype=torch.uint8), torch.tensor([1.0, 0.0, 0.0, 0.0])
    learner.obs_stats.update(frames[:, -1:] / 256)
    losses = snd_script.novelty_step(learner, args, frames, labels, frames[:, -1:], torch.ones(8, dtype=torch.bool))
    inputs = snd_script.novelty_input(frames, learner.obs_stats, args.norm_obs), frames / 256
    nets = [before.target] + ([before.encoder] if hasattr(before, "encoder") else [])
    for (x, views), expected, net, loss in zip(seen, inputs, nets, losses[1:], strict=False):
        assert torch.equal(x, expected)
        torch.testing.assert_close(loss, snd_script.contrastive_loss(net(views).detach(), labels))
    assert len(seen) == len(nets) == len(losses) - 1
    with torch.no_grad():  # the target, as it has just learned to be, is what the predictor looks at
        errors = before.predictor(inputs[0]) - learner.target(inputs[0])
    torch.testing.assert_close(losses[0], errors.square().mean())


def test_descend(snd: ModuleType) -> None:
    """Each step follows its own gradient alone, cut to a norm only where one is given."""
    weight = torch.nn.Parameter(torch.zeros(2))
    for max_grad_norm, expected in ((None, [-3.0, -4.0]), (0.5, [-3.3, -4.4]), (None, [-6.3, -8.4])):
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        snd.descend(torch.optim.SGD([weight], lr=1), loss, max_grad_norm)
        torch.testing.assert_close(weight.detach(), torch.tensor(expected))


def test_only_the_policys_gradient_is_clipped(script: ModuleType) -> None:
    """To --max-grad-norm; every network has one optimiser of its own, with --learning-rate."""
    args, rollout = make_args(script, max_grad_norm=1e-3), random_rollout(script, 8, 4)
    learner = make_learner(script, args)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    script.update(learner, rollout, *inputs, args)
    for name, optimizer in vars(learner).items():
        if isinstance(optimizer, torch.optim.Optimizer):
            network = getattr(learner, name.removesuffix("optimizer").removesuffix("_") or "agent")
            (group,) = optimizer.param_groups
            assert group["lr"] == args.learning_rate
            assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]
            norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()
            assert norm == pytest.approx(1e-3, rel=1e-3) if network is learner.agent else norm > 2e-3, name


def test_policy_losses_are_means(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all minibatches of all epochs."""
    args, rollout = make_args(script, update_epochs=2), random_rollout(script, 8, 4)
    learner, given, ppo_loss = make_learner(script, args), [], script.ppo_loss

    def record(*batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, stats = ppo_loss(*batch)
        given.append(stats)
        return loss, stats

    monkeypatch.setattr(script, "ppo_loss", record)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    losses, _ = script.update(learner, rollout, *inputs, args)
    assert len(given) == 4
    torch.testing.assert_close([losses[name] for name in script.POLICY_LOSSES], [*torch.stack(given).mean(dim=0)])


def test_int_coef_0_is_plain_ppo(script: ModuleType) -> None:
    """No intrinsic reward reaches the policy or its values; SND + entropy needs --entropy-coef 0 as well."""
    args, rollout = make_args(script, int_coef=0.0), random_rollout(script, 8, 4)
    if num_heads(script) == 3:
        args.entropy_coef = 0.0
    weights = []
    for scale in (0.0, 1.0):
        learner = make_learner(script, args)
        streams = [scale * torch.rand(8, 4) * rollout.valid for _ in range(num_heads(script) - 1)]
        extra = [torch.zeros(32, 512)] if script.__name__ == RND else []
        torch.manual_seed(5)
        script.update(learner, rollout, *script.estimate_advantages(rollout, *streams, args), *extra, args)
        weights.append(learner.agent.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
