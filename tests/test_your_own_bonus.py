"""The diffs of docs/your_own_bonus.md apply; the copies run, are killed and go on; their bonuses are right."""

import copy
import importlib
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Rows

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SND, Recorder, make_args, make_learner, random_rollout
from running import BATCH, ENDLESS, RUN, call_main, flags, read_checkpoint, read_scalars, resume, start, wait_until
from test_in_step import no_synchronisation

PAGE = (ROOT / "docs/your_own_bonus.md").read_text()
DIFFS = {re.search(r"\+\+\+ b/ppo_(\w+)_", diff)[1]: diff for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.S)}


@pytest.fixture(params=DIFFS)
def copied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A changed copy of the script, beside its models.py in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(ROOT / f"{SND}.py", name := f"ppo_{request.param}_atari.py")
    shutil.copy(ROOT / "models.py", ".")
    subprocess.run(["git", "apply"], input=DIFFS[request.param], text=True, check=True)
    return importlib.import_module(name[:-3])


def test_copy_is_killed_and_goes_on(copied: ModuleType) -> None:
    """Every iteration pays a bonus and is logged once; optimisers, counts and learning rate go on."""
    times = set()  # of the checkpoints: before training, then after each iteration
    process = start(Path(copied.__file__[:-3]), [*flags(1, "--checkpoint-interval", "1"), *ENDLESS], Path.cwd())
    wait_until(lambda: times.update(path.stat().st_mtime_ns for path in RUN.glob("*.pt")) or len(times) > 2, process)
    process.kill()
    process.wait()
    before = read_checkpoint(RUN)
    iterations = before["counters"]["global_step"] // BATCH + 1
    assert call_main(copied, resume(iterations)) == 0
    after, scalars = read_checkpoint(RUN), read_scalars(RUN)
    steps, rewards = zip(*scalars["charts/intrinsic_reward"], strict=True)
    assert [*steps] == [*range(BATCH, BATCH * iterations + 1, BATCH)] and len(steps) > 2
    assert min(rewards) > 0 and max(rewards) < 1
    for optimizer in after["optimizers"].values():
        assert {moments["step"].item() for moments in optimizer.values()} == {iterations}
    if "simhash" in copied.__name__:  # no game ends in so few steps
        counts, old = (state["learner"]["counts"] for state in (after, before))
        assert (counts >= old).all() and counts.sum() == old.sum() + BATCH == iterations * BATCH
        assert after["learner"]["obs_stats.count"] == 4 * 2  # or the codes would drift
    if "anneal" in copied.__name__:
        assert scalars["charts/learning_rate"][-1][1] == pytest.approx(1e-4 / iterations)


def play_and_reward(script: ModuleType) -> tuple:
    """A learner, its arguments, 80 real steps in which lost lives are ends, and their rewards from two rollouts."""
    args = make_args(script, episodic_life=True)
    learner, played = make_learner(script, args), Recorder(script, args).play(80)
    script.init_obs_stats(learner.obs_stats, args, 1)
    obs, valid, actions = torch.from_numpy(played.obs), torch.from_numpy(~played.resets[:-1]), torch.randint(4, (80, 4))
    assert not valid.all()
    rollouts = [Rows(obs=obs[t:][:41], valid=valid[t:][:40], actions=actions[t:][:40]) for t in (0, 40)]
    rewards = torch.cat([script.intrinsic_rewards(learner, rollout, args) for rollout in rollouts])
    return learner, args, obs, valid, actions, rewards


@pytest.mark.parametrize("copied", ["simhash"], indirect=True)
def test_counts_are_those_of_a_dictionary(copied: ModuleType) -> None:
    """Each frame that a valid step led to is counted once, then rewarded."""
    learner, args, obs, valid, _, rewards = play_and_reward(copied)
    x = copied.novelty_input(obs[1:].flatten(0, 1), learner.obs_stats, args.norm_obs).flatten(1)
    sides = torch.stack([(x * plane).sum(dim=1) > 0 for plane in learner.projection.T], dim=1)
    codes = [sum(2**i for i, side in enumerate(bits) if side) for bits in sides.tolist()]
    counts = Counter(code for code, counted in zip(codes, valid.flatten(), strict=True) if counted)
    assert {i: n for i, n in enumerate(learner.counts.tolist()) if n} == counts and max(counts.values()) > 1
    expected = torch.tensor([0.5 / max(counts[code], 1) ** 0.5 for code in codes]).view_as(rewards) * valid
    torch.testing.assert_close(rewards[40:], expected[40:])


@pytest.mark.parametrize("copied", ["icm"], indirect=True)
def test_icm_in_other_words(copied: ModuleType) -> None:
    """The bonus; the encoder learns from the inverse model; no loss sees a reset row or waits for a GPU."""
    learner, args, obs, valid, actions, rewards = play_and_reward(copied)
    first, _, last = learner.icm.forward_model
    x = copied.novelty_input(obs.flatten(0, 1), learner.obs_stats, args.norm_obs)
    features = learner.icm.encoder(x).unflatten(0, obs.shape[:2]).detach()
    hidden = features[:-1] @ first.weight[:, :512].T + first.weight.T[512 + actions] + first.bias
    errors = (last(F.elu(hidden)) - features[1:]).square().mean(dim=-1)
    torch.testing.assert_close(rewards, (0.5 * errors).clamp(0, 1) * valid)

    learner.icm(x[:4], x[4:8], actions[0])[2].sum().backward()
    assert first.weight.grad.any() and all(weight.grad is None for weight in learner.icm.encoder.parameters())

    def losses(batch: dict, change: int) -> dict:
        next_obs = batch["next_obs"] + change * ~batch["valid"][:, None, None, None]
        with no_synchronisation():
            return copied.train_novelty(copy.deepcopy(learner), args, **(batch | {"next_obs": next_obs}))

    rollout, batches = random_rollout(copied), []
    rollout.obs = torch.arange(36, dtype=torch.uint8).view(9, 4, 1, 1, 1).expand(9, 4, 4, 96, 96)
    copied.update(rollout, rewards[:8], torch.zeros(8, 4, 2), lambda **_: {}, lambda **x: batches.append(x) or {}, args)
    assert len(batches) == 2 and not rollout.valid.all()
    for batch in batches:
        assert (batch["next_obs"] == batch["obs"] + 4).all() and losses(batch, 0) == losses(batch, 99)
