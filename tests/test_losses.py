"""The losses and rewards against independent references, and the random parts by their rates and ranges."""

from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ENTROPY, RND, SND, make_args, make_learner, random_rollout, reward_and_estimate, update
from running import call_main, flags, read_checkpoint
from scipy.signal import lfilter
from torch import Tensor

import ppo_snd_atari as snd

RND_AND_SND = pytest.mark.parametrize("script", [RND, SND], indirect=True)  # for what SND + entropy shares with SND


@pytest.mark.parametrize("coefs", [(2.0, 1.0), (0.0, 1.0), (2.0, 0.0)])
def test_ppo_loss(coefs: tuple[float, float]):
    """Losses and gradients of the paper's formulas over the valid rows; a head without a coefficient does not learn."""
    torch.manual_seed(0)
    logits, values, keep = torch.randn(64, 5), torch.randn(64, 2, requires_grad=True), torch.rand(64) < 0.8
    actions = torch.randint(5, (64,))
    logprobs = logits.log_softmax(dim=1).gather(1, actions[:, None])[:, 0] + 0.2 * torch.randn(64)
    logits.requires_grad_()
    batch = {"actions": actions, "logprobs": logprobs, "advantages": torch.randn(64), "returns": torch.randn(64, 2)}
    args = make_args(snd, ent_coef=0.1, vf_coef=0.7, clip_coef=0.3, ext_coef=coefs[0], int_coef=coefs[1])
    # A policy that does not look at its frames.
    loss_of = partial(snd.ppo_loss, lambda _obs: (logits, values), args, obs=torch.zeros(0), **batch)
    loss, losses = loss_of(valid=keep)
    assert loss_of(valid=torch.zeros_like(keep))[0] == 0  # not 0 / 0
    gradients = torch.autograd.grad(loss, [logits, values])

    rows = {name: x[keep] for name, x in batch.items()}
    policy = torch.distributions.Categorical(logits=logits.double()[keep])
    ratio = torch.exp(policy.log_prob(rows["actions"]) - rows["logprobs"])
    objective = torch.min(ratio * rows["advantages"], ratio.clip(0.7, 1.3) * rows["advantages"]).mean()
    errors = [(values[keep, i] - rows["returns"][:, i]).square().mean() for i in range(2) if coefs[i] > 0]
    expected = {"policy_loss": -objective, "value_loss": sum(errors), "entropy": policy.entropy().mean()}
    expected["approx_kl"] = (ratio - 1 - ratio.log()).mean()
    expected["clipfrac"] = ((ratio < 0.7) | (ratio > 1.3)).double().mean()
    assert losses.keys() == expected.keys() and 0.05 < losses["clipfrac"] < 0.9
    for name, x in losses.items():
        assert not x.requires_grad  # which would keep the minibatch and its gradients in memory
        torch.testing.assert_close(x.double(), expected[name].detach().double(), atol=1e-6, rtol=1e-4)
    expected = expected["policy_loss"] + 0.7 * expected["value_loss"] - 0.1 * expected["entropy"]
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, [logits, values]), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_distillation_loss(share: float):
    """The mean squared error of the kept elements, which are a random share of the elements of the valid rows."""
    torch.manual_seed(1)
    target, valid = torch.randn(200, 512), torch.rand(200) < 0.7
    predictor = torch.randn(200, 512, requires_grad=True)
    loss = snd.distillation_loss(predictor, target, valid, share)
    loss.backward()
    kept = predictor.grad != 0
    assert not kept[~valid].any() and near(kept[valid].double().mean().item(), share, valid.sum().item() * 512)
    assert share == 1 or 0 < kept[valid].float().mean(dim=1).std() < 0.03  # elements are drawn, not whole rows
    errors = (predictor - target)[kept].detach().double()
    np.testing.assert_allclose(loss.item(), (errors**2).mean().item(), rtol=1e-5)
    torch.testing.assert_close(predictor.grad[kept].double(), 2 * errors / len(errors), atol=1e-10, rtol=1e-4)
    assert snd.distillation_loss(predictor, target, torch.zeros(200, dtype=torch.bool), share) == 0  # not 0 / 0


def near(share: float, expected: float, samples: int) -> bool:
    """Within 4.5 standard errors of a share."""
    return abs(share - expected) <= 4.5 * (expected * (1 - expected) / samples) ** 0.5


def test_draw_pairs():
    """Half the labels are 1; label 0 is the same row, label 1 any other; only the given rows are drawn."""
    torch.manual_seed(0)
    valid_inds, num_pairs = torch.tensor([3, 5, 6, 10, 11, 12, 20, 21, 30, 31]), 40_000
    rows, labels = snd.draw_pairs(valid_inds, num_pairs)
    assert rows.shape == (2 * num_pairs,) and labels.shape == (num_pairs,) and labels.dtype == torch.float32
    assert set(rows.tolist()) == set(valid_inds.tolist())
    a, b = rows.chunk(2)
    assert torch.equal(a != b, labels == 1) and near(labels.mean().item(), 0.5, num_pairs)
    for row in valid_inds:
        assert near((a == row).double().mean().item(), 0.1, num_pairs)
        others = b[(a == row) & (labels == 1)]
        shares = [(others == other).double().mean().item() for other in valid_inds if other != row]
        assert all(near(share, 1 / 9, len(others)) for share in shares)


def block_means(x: np.ndarray, size: int) -> np.ndarray:
    """(samples, 24, 24) -> (samples, 24 / size, 24 / size)."""
    return x.reshape(-1, 24 // size, size, 24 // size, size).mean(axis=(2, 4))


def test_augment():
    """Of 4,000 frames each becomes one of three views; a tenth of some's pixels are dropped; all get noise."""
    torch.manual_seed(0)
    x = torch.randint(100, 201, (4000, 1, 24, 24)).float()
    y = snd.augment(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    x, y = x[:, 0].double().numpy(), y[:, 0].double().numpy()
    dropped = np.abs(y) < 1  # nothing else is near 0
    views = {
        name: np.kron(block_means(x, n), np.ones((n, n))) for name, n in (("plain", 1), ("half", 2), ("quarter", 4))
    }
    became = {name: (dropped | (np.abs(y - view) <= 0.2001)).all(axis=(1, 2)) for name, view in views.items()}
    assert (sum(mask.astype(int) for mask in became.values()) == 1).all()
    for name, share in {"quarter": 1 / 4, "half": 1 / 2 * 3 / 4, "plain": 1 / 2 * 3 / 4}.items():
        assert near(became[name].mean(), share, 4000)

    hit = dropped.any(axis=(1, 2))
    assert near(hit.mean(), 1 / 8, 4000) and near(hit[became["quarter"]].mean(), 1 / 8, became["quarter"].sum())
    assert near(dropped[hit].mean(), 1 / 10, dropped[hit].size)
    two_of_four = (block_means(dropped[hit], 2) >= 1 / 2).mean()  # single pixels, after pooling
    assert near(two_of_four, 1 - 0.9**4 - 4 * 0.1 * 0.9**3, hit.sum() * 144)

    base = sum(np.where(became[name][:, None, None], view, 0) for name, view in views.items())
    noise = y - np.where(dropped, 0, base)
    assert -0.2001 < noise.min() < -0.199 and 0.199 < noise.max() < 0.2001
    assert (noise.std(axis=(1, 2)) > 0.08).all() and (noise.std(axis=0) > 0.08).all()  # each pixel has its own
    counts = np.histogram(noise, bins=8, range=(-0.2, 0.2))[0] / noise.size
    assert (np.abs(counts - 1 / 8) < 0.002).all()


@RND_AND_SND
@torch.no_grad()
def test_intrinsic_rewards(script: ModuleType):
    """Row t is paid for the newest frame of obs[t + 1], also in the last row and where chunks meet; reset rows are not.

    Paid is the sum (RND) or the mean (SND) of the squared errors, scaled and clipped to [0, 1]. With --norm-int-reward
    that is divided by the deviation of its discounted sum over time, over several rollouts.
    """
    args, rollout = make_args(script, num_steps=130, norm_int_reward=True), random_rollout(script, 130)
    learner = make_learner(script, args)
    script.update_obs_stats(learner.obs_stats, rollout)
    assert script.CHUNK < 130 * 4
    x = script.novelty_input(rollout.obs[1:].flatten(0, 1), learner.obs_stats, args.norm_obs)
    target = learner.target(x).view(130, 4, 512)
    squares = (target - learner.predictor(x).view_as(target)).square()
    errors = squares.sum(dim=2) if script.__name__ == RND else squares.mean(dim=2)
    args.int_reward_scale = 1 / errors.median().item()
    plain = (args.int_reward_scale * errors.double()).clamp(max=1) * rollout.valid

    def rewards() -> Tensor:
        result = script.intrinsic_rewards(learner, rollout, args)
        if script.__name__ == RND:
            result, features = result
            torch.testing.assert_close(features[1:], target, atol=1e-4, rtol=1e-4)
        return result.double()

    sums = lfilter([1], [1, -args.int_gamma], plain.repeat(2, 1), axis=0)
    for rows in (130, 260):  # a reset row pays nothing and does not count, but time goes by
        deviation = np.std(sums[:rows][rollout.valid.repeat(2, 1)[:rows]])
        torch.testing.assert_close(rewards(), plain / deviation, atol=1e-6, rtol=1e-3)
    args.norm_int_reward = False
    torch.testing.assert_close(rewards(), plain, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("script", "ext_coef"), [(RND, 0), (SND, 0), (ENTROPY, 0), (SND, 2)], indirect=["script"])
def test_ext_coef_0_needs_no_rewards(script: ModuleType, ext_coef: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained on the same games, paid and unpaid, the weights are bit-identical exactly if the coefficient is 0."""
    paid, weights, recv = [], [], script.AtariEnvs.recv
    more = ["--env-id", "Breakout-v5", "--ext-coef", str(ext_coef), "--num-steps", "64", "--total-timesteps", "256"]
    for share in (1, 0):

        def shared_recv(envs: object, group: int, share: int = share) -> tuple:
            rewards, *ends = recv(envs, group)
            paid.append(rewards.sum())
            return share * rewards, *ends

        monkeypatch.setattr(script.AtariEnvs, "recv", shared_recv)
        assert call_main(script, flags(1, *more, "--run-name", str(share))) == 0
        weights.append(read_checkpoint(Path("runs", str(share)))["learner"])
    assert sum(paid[2:]) > 0  # the game did pay, also after the frame statistics
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == (ext_coef == 0)


def test_update_trains_every_network(script: ModuleType):
    """One update changes every weight of a trained network and none of a frozen target.

    Only the policy's gradient is clipped, to --max-grad-norm.
    """
    args, rollout = make_args(script, max_grad_norm=1e-3), random_rollout(script)
    learner, before = make_learner(script, args), make_learner(script, args)
    _, inputs = reward_and_estimate(script, learner, rollout, args)
    update(script, learner, rollout, inputs, args)
    old = dict(before.named_parameters())
    for name, weight in learner.named_parameters():
        assert torch.equal(weight, old[name]) == (name.startswith("target") and script.__name__ == RND), name
    for name in learner.optimizers:
        norm = torch.nn.utils.get_total_norm([p.grad for p in getattr(learner, name).parameters()]).item()
        assert norm == pytest.approx(1e-3, rel=1e-3) if name == "agent" else norm > 2e-3, name


def test_descend():
    """Each step follows its own gradient alone, cut to a norm only where one is given."""
    weight = torch.nn.Parameter(torch.zeros(2))
    for more, expected in (((), [-3.0, -4.0]), ((0.5,), [-3.3, -4.4]), ((), [-6.3, -8.4])):
        snd.descend(torch.optim.SGD([weight], lr=1), (weight * torch.tensor([3.0, 4.0])).sum(), *more)
        torch.testing.assert_close(weight.detach(), torch.tensor(expected))


@RND_AND_SND
def test_minibatches(script: ModuleType):
    """Every epoch is a shuffled partition of the rollout's rows, each whole; 64 pairs a minibatch, of valid rows.

    A pair is twice one frame exactly where its label is 0. The losses are means over all minibatches.
    """
    args, rollout = make_args(script, num_minibatches=4, update_epochs=3), random_rollout(script)
    rows, frames = torch.arange(32).view(8, 4), rollout.obs[:-1].flatten(0, 1)
    policy_steps, novelty_steps = [], []
    rollout.logprobs, advantages, returns = -rows / 100, rows * 2.0, torch.stack([rows, rows + 50], dim=-1)
    features = (torch.arange(36).view(9, 4, 1) + torch.zeros(512),) if script.__name__ == RND else ()

    def record(steps: list, name: str, **minibatch: Tensor) -> dict[str, Tensor]:
        steps.append(minibatch)
        return {name: torch.tensor(float(len(steps)))}

    recorders = partial(record, policy_steps, "first"), partial(record, novelty_steps, "second")
    losses = script.update(rollout, advantages, returns, *features, *recorders, args)
    assert losses == {"first": 6.5, "second": 6.5}
    inds = [(step["logprobs"] * -100).round().long() for step in policy_steps]
    assert [len(rows) for rows in inds] == [8] * 12
    epochs = [torch.cat(inds[start : start + 4]).tolist() for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    valid, reset = rollout.valid.flatten(), {frame.numpy().tobytes() for frame in frames[~rollout.valid.flatten()]}
    for ind, policy, novelty in zip(inds, policy_steps, novelty_steps, strict=True):
        expected = {"obs": frames[ind], "valid": valid[ind], "actions": rollout.actions.flatten()[ind]}
        assert all(torch.equal(novelty[name], expected[name]) for name in ("obs", "valid"))
        expected |= {"advantages": 2.0 * ind, "returns": torch.stack([ind, ind + 50], dim=1)}
        assert all(torch.equal(policy[name], x) for name, x in expected.items())
        if script.__name__ == RND:
            assert torch.equal(novelty["target_features"][:, 0], ind.float())
        else:
            a, b = novelty["pair_obs"].chunk(2)
            assert len(a) == len(novelty["labels"]) == 64
            assert torch.equal((a == b).flatten(1).all(dim=1), novelty["labels"] == 0)
            assert not reset & {frame.numpy().tobytes() for frame in novelty["pair_obs"]}


def test_train_novelty(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The target sees augmented views of normalised frames, the encoder of frames / 256; then the predictor learns.

    Its target is the one that has just learned; unless told otherwise it keeps a share of min(1, 32 / num_envs).
    """
    seen, shares = [], []
    augment, distillation_loss = snd.augment, script.distillation_loss

    def record_views(x: Tensor) -> Tensor:
        seen.append((x.clone(), augment(x)))
        return seen[-1][1]

    def record_share(*inputs: object) -> Tensor:
        shares.append(inputs[3])
        return distillation_loss(*inputs[:3], 1.0)

    monkeypatch.setattr(script, "augment", record_views, raising=False)
    monkeypatch.setattr(script, "distillation_loss", record_share)
    args = make_args(script)
    learner, before, frames = make_learner(script, args), make_learner(script, args), random_rollout(script).obs[0]
    learner.obs_stats.update(frames[:, -1:] / 256)
    inputs = script.novelty_input(frames, learner.obs_stats, args.norm_obs), frames / 256
    labels, valid = torch.tensor([1.0, 0.0]), torch.tensor([True, True, True, False])
    states = {"obs": frames, "valid": valid, "pair_obs": frames, "labels": labels}
    if script.__name__ == RND:
        states = {"obs": frames, "valid": valid, "target_features": before.target(inputs[0])}
    losses = script.train_novelty(learner, args, **states)
    assert not any(x.requires_grad for x in losses.values())
    with torch.no_grad():
        errors = (before.predictor(inputs[0]) - learner.target(inputs[0]))[valid]
        torch.testing.assert_close(losses["distillation"], errors.square().mean())
        contrasted = {RND: [], SND: ["target"], ENTROPY: ["target", "encoder"]}[script.__name__]
        names = {"target": "contrastive", "encoder": "contrastive_entropy"}
        for name, (x, views), expected in zip(contrasted, seen, inputs, strict=False):
            assert torch.equal(x, expected)
            a, b = getattr(before, name)(views).chunk(2)
            distances = (a - b).square().mean(dim=1)
            torch.testing.assert_close(losses[names[name]], ((1 - distances[0]) ** 2 + distances[1] ** 2) / 2)
    assert len(seen) == len(contrasted)
    for num_envs, update_proportion in ((40, None), (128, None), (128, 0.5)):
        args.num_envs, args.update_proportion = num_envs, update_proportion
        script.train_novelty(learner, args, **states)
    assert shares == [1, 0.8, 0.25, 0.5]
