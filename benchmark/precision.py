"""What bfloat16 and TF32 do to the policy's probability ratios and to the novelty reward, measured on this machine.

    python benchmark/precision.py
    python benchmark/precision.py --model C --device cuda --out precision.json

Policy: PPO assumes that the ratio of new to old action probabilities is 1 before the first update. The actions are
chosen in small batches and trained on in large ones, so rounding can move it. After some training by the script's own
`main`, rollouts in bfloat16 and float32 are compared with the forward pass of the update, for the policy as it is and
for the same policy with its logits scaled up until it has half the entropy of a uniform one: late policies are
decided, and the larger a logit, the larger its rounding.

Novelty: the reward is a squared difference of two networks' features, which shrinks as the predictor learns, while
rounding does not. Predictors are trained on real frames until their reward is small; then the rewards of each
precision are compared with float64. The rounding floor is the mean absolute error as a share of the mean reward.
"""

import contextlib
import copy
import importlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import tyro
from cli import check_output, fail
from throughput import Script, run_main
from torch import Tensor

PRECISIONS = ["float32", "TF32", "bfloat16"]
RATIO_TARGET = 0.01  # largest |ratio - 1| before an update, as a share of the clip range
FLOOR_TARGET = 0.01  # largest error of the novelty reward, as a share of the reward


@dataclass
class Options:
    script: Script = "ppo_rnd_atari"
    """script that trains the policy"""
    model: Literal["A", "B", "C", "D"] = "A"
    """architecture of policy and value"""
    env_id: str = "MontezumaRevengeNoFrameskip-v4"
    """the game"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to measure; auto takes the GPU if there is one"""
    iterations: int = 5
    """training iterations of the policy"""
    num_envs: int = 16
    """games played side by side"""
    num_steps: int = 64
    """steps of each environment between two updates"""
    num_frames: int = 64
    """frames of a random policy on which the predictors learn"""
    goal: float = 1e-3
    """mean novelty reward at which the predictors stop to learn"""
    max_updates: int = 3000
    """most training steps of a predictor, if it does not reach the goal"""
    seed: int = 1
    """seed of everything"""
    out: Path | None = None
    """JSON file for the figures"""


# ---- Policy ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bf16_everywhere(script: ModuleType) -> Iterator[None]:
    """Let `bf16` of the arguments alone decide, also where the script finds bfloat16 too slow on this hardware."""

    def autocast(args: object, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=device.type == "cpu")

    with patch.object(script, "autocast", autocast):
        yield


def trained_learner(script: ModuleType, args: object, device: torch.device) -> object:
    """The learner that the script's `main` leaves behind after `args.total_timesteps`."""
    with tempfile.TemporaryDirectory() as folder:
        fields = ["env_id", "model", "num_envs", "num_steps", "num_minibatches", "total_timesteps", "norm_init_steps"]
        values = {name: getattr(args, name) for name in [*fields, "seed", "bf16", "cuda"]}
        run_main(script, values | {"run_name": "run"}, Path(folder))
        path = Path(folder) / "runs" / "run" / "checkpoint.pt"
        state = script.load_checkpoint(path)
        envs = script.AtariEnvs(args, args.seed)
        learner = script.Learner(args, envs.num_actions, device)
        envs.close()
        script.restore(state, learner, path)
    return learner


def mean_entropy(logits: Tensor) -> float:
    """Mean entropy, in nats, of the policies given by logits (batch, actions)."""
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def sharpen(agent: nn.Module, obs: Tensor, entropy: float) -> float:
    """Scale the actor's last layer so that the mean entropy on obs (batch, 4, 96, 96) is `entropy`; returns the scale.

    Logits are linear in that layer, and the entropy falls as they grow.
    """
    with torch.no_grad():
        logits = agent(obs)[0]
        low, high = 1e-3, 1e6
        while high / low > 1.001:
            scale = math.sqrt(low * high)
            low, high = (scale, high) if mean_entropy(scale * logits) > entropy else (low, scale)
        agent.actor[-1].weight *= scale
        agent.actor[-1].bias *= scale
    return scale


def ratio_errors(script: ModuleType, learner: object, rollout: object, args: object) -> np.ndarray:
    """|ratio - 1| of the valid rows, from the update's forward pass over shuffled minibatches, before any step."""
    obs, actions, old = rollout.obs[:-1].flatten(0, 1), rollout.actions.flatten(), rollout.logprobs.flatten()
    errors = torch.empty_like(old)
    for inds in torch.randperm(len(obs), device=obs.device).split(len(obs) // args.num_minibatches):
        with script.autocast(args, obs.device):
            logits, _ = learner.agent(obs[inds])
        new = logits.detach().log_softmax(dim=1).gather(1, actions[inds, None])[:, 0]
        errors[inds] = ((new - old[inds]).exp() - 1).abs()
    return errors[rollout.valid_inds].cpu().numpy()


def policy_figures(script: ModuleType, learner: object, args: object, device: torch.device) -> list[dict]:
    """One row for each pair of precisions, of the policy as it is and then sharpened."""
    envs, rows = script.AtariEnvs(args, args.seed), []
    obs = torch.zeros(args.num_steps + 1, args.num_envs, 4, 96, 96, dtype=torch.uint8, device=device)
    for sharpened in (False, True):
        if sharpened:
            sharpen(learner.agent, obs[:-1].flatten(0, 1), math.log(envs.num_actions) / 2)
        for played in (True, False):
            args.bf16 = played
            with gpu_tf32(played):  # as `main` sets it for --bf16 and --no-bf16
                rollout = script.collect_rollout(envs, learner, obs, args)
            with torch.no_grad():
                entropy = mean_entropy(learner.agent(obs[:-1].flatten(0, 1))[0])
            for args.bf16 in (True, False) if played else (False,):
                with gpu_tf32(args.bf16):
                    errors = ratio_errors(script, learner, rollout, args) / args.clip_coef
                names = ["bfloat16" if bf16 else "float32" for bf16 in (played, args.bf16)]
                row = {"policy": "sharpened" if sharpened else "trained", "entropy": entropy}
                row |= {"rollout": names[0], "update": names[1], "rows": len(errors)}
                row |= {"p99.9": float(np.quantile(errors, 0.999)), "max": float(errors.max())}
                rows.append(row | {"sound": bool(errors.max() < RATIO_TARGET)})
    envs.close()
    return rows


# ---- Novelty ---------------------------------------------------------------------------------------------------------


def round_to_tf32(x: Tensor) -> Tensor:
    """x (float32) rounded to the 10 explicit mantissa bits of TF32, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).view_as(x)


def emulated_tf32(net: nn.Sequential, x: Tensor) -> Tensor:
    """net(x) with the inputs and weights of every convolution and linear layer in TF32, the sums in float32."""
    for layer in copy.deepcopy(net):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data, x = round_to_tf32(layer.weight.data), round_to_tf32(x)
        x = layer(x)
    return x


@contextlib.contextmanager
def gpu_tf32(allowed: bool) -> Iterator[None]:
    """Let the GPU's convolutions and matrix products use TF32, or not; no effect on a CPU."""
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = allowed
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def random_frames(script: ModuleType, args: object, count: int, device: torch.device) -> Tensor:
    """Every fourth observation of a random policy, (count, 4, 96, 96) uint8."""
    envs, rng = script.AtariEnvs(args, args.seed), np.random.default_rng(args.seed)
    frames = np.empty((0, 4, 96, 96), np.uint8)
    while len(frames) < count:
        frames = np.concatenate([frames, envs.next_obs[~envs.next_done]])
        for _ in range(4):
            envs.step(rng.integers(envs.num_actions, size=args.num_envs, dtype=np.int32))
    envs.close()
    return torch.from_numpy(frames[:count]).to(device)


@torch.no_grad()
def rewards_in(precision: str, script: ModuleType, learner: object, frames: Tensor, args: object) -> Tensor:
    """Novelty rewards (batch,) of frames (batch, 4, 96, 96) uint8, the networks running in `precision`."""
    x, nets = script.novelty_input(frames, learner.obs_stats, args.norm_obs), (learner.target, learner.predictor)
    with gpu_tf32(precision == "TF32"), torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        if precision == "float64":
            features = [copy.deepcopy(net).double()(x.double()) for net in nets]
        elif precision == "TF32" and x.device.type == "cpu":
            features = [emulated_tf32(net, x) for net in nets]
        else:
            features = [net(x).float() for net in nets]
    return script.novelty(*features, args.int_reward_scale)


def train_novelty(script: ModuleType, learner: object, frames: Tensor, args: object, options: Options) -> int:
    """Train the predictor (in SND also the target) on the frames until the reward is at the goal; returns the steps."""
    everything, valid = (
        torch.arange(len(frames), device=frames.device),
        torch.ones(64, dtype=bool, device=frames.device),
    )
    script.update_obs_stats(learner.obs_stats, frames, everything)
    for step in range(options.max_updates):
        if step % 25 == 0 and rewards_in("float32", script, learner, frames, args).mean() <= options.goal:
            return step
        if hasattr(learner, "target_optimizer"):
            inds, labels = script.draw_pairs(everything, 1, script.NUM_PAIRS)
            pairs = script.augment(script.novelty_input(frames[inds[0]], learner.obs_stats, args.norm_obs))
            script.descend(learner.target_optimizer, script.contrastive_loss(learner.target(pairs), labels[0]))
        inds = torch.randperm(len(frames), device=frames.device)[: len(valid)]
        x = script.novelty_input(frames[inds], learner.obs_stats, args.norm_obs)
        with torch.no_grad():
            target_features = learner.target(x)
        loss = script.distillation_loss(learner.predictor(x), target_features, valid[: len(x)], 1.0)
        script.descend(learner.predictor_optimizer, loss)
    return options.max_updates


def novelty_figures(name: str, options: Options, device: torch.device) -> dict:
    """Mean reward in float64 and, of each precision, the mean absolute error as a share of it."""
    script = importlib.import_module(name)
    # A larger learning rate than in training: only how small the reward is matters here, not how it became so.
    args = script.Args(env_id=options.env_id, model="A", num_envs=8, seed=options.seed, learning_rate=3e-4)
    torch.manual_seed(options.seed)
    frames = random_frames(script, args, options.num_frames, device)
    learner = script.Learner(args, 1, device)
    updates = train_novelty(script, learner, frames, args, options)
    exact = rewards_in("float64", script, learner, frames, args)
    floors = {
        precision: ((rewards_in(precision, script, learner, frames, args) - exact).abs().mean() / exact.mean()).item()
        for precision in PRECISIONS
    }
    return {"script": name, "updates": updates, "reward": exact.mean().item(), "floor": floors}


# ---- Report ----------------------------------------------------------------------------------------------------------


def measure(options: Options) -> dict:
    """Both measurements, as plain numbers."""
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    script = importlib.import_module(options.script)
    steps = options.iterations * options.num_envs * options.num_steps
    args = script.Args(env_id=options.env_id, model=options.model, num_envs=options.num_envs, seed=options.seed)
    args.num_steps, args.total_timesteps = options.num_steps, steps
    args.num_minibatches = math.gcd(4, options.num_envs * options.num_steps)
    args.norm_init_steps, args.cuda = 16, device.type == "cuda"
    script.check_args(args)
    with bf16_everywhere(script):
        learner = trained_learner(script, args, device)
        policy = policy_figures(script, learner, args, device)
    novelty = [novelty_figures(name, options, device) for name in ("ppo_rnd_atari", "ppo_snd_atari")]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    emulated = device.type == "cpu"
    return {"device": name, "tf32_emulated": emulated, "trained_steps": steps, "policy": policy, "novelty": novelty}


def table(figures: dict) -> str:
    """The figures for people."""
    lines = [
        f"{figures['device']}, policy trained for {figures['trained_steps']:,} steps",
        "",
        "|ratio - 1| before the first update, as a share of the clip range",
        f"{'policy':<12}{'entropy':>8}  {'rollout':<10}{'update':<10}{'99.9 %':>9}{'max':>9}  under {RATIO_TARGET:.0%}",
    ]
    lines += [
        f"{row['policy']:<12}{row['entropy']:>8.2f}  {row['rollout']:<10}{row['update']:<10}{row['p99.9']:>9.3%}"
        f"{row['max']:>9.3%}  {'yes' if row['sound'] else 'NO'}"
        for row in figures["policy"]
    ]
    lines += ["", "error of the novelty reward against float64, as a share of the mean reward"]
    lines += [f"{'networks of':<16}{'mean reward':>12}  {'precision':<18}{'error':>10}  under {FLOOR_TARGET:.0%}"]
    for row in figures["novelty"]:
        for precision, floor in row["floor"].items():
            label = f"{precision}, emulated" if precision == "TF32" and figures["tf32_emulated"] else precision
            sound = "yes" if floor < FLOOR_TARGET else "NO"
            lines += [f"{row['script']:<16}{row['reward']:>12.2e}  {label:<18}{floor:>10.4%}  {sound}"]
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__.splitlines()[0])
    for name in ("iterations", "num_frames", "max_updates", "goal"):
        if getattr(options, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)}: must be larger than 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA device")
    if options.out:
        check_output(options.out)
    figures = measure(options)
    print(table(figures))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
