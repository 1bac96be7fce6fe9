"""PPO with self-supervised network distillation plus an entropy stream (SND + entropy) for Atari, in one file.

    python ppo_snd_entropy_atari.py --env-id MontezumaRevengeNoFrameskip-v4
    python ppo_snd_entropy_atari.py --env-id ALE/Venture-v5 --model A --num-envs 32 --seed 2
    python ppo_snd_entropy_atari.py --resume runs/NAME

SND rewards frames that its predictor does not yet imitate. The second intrinsic stream rewards trajectories that keep
changing what they see: each environment remembers the features of its last states, and their standard deviation is
the reward. What makes it work:

1. three value heads with their own discounts; the intrinsic streams flow on across the ends of episodes;
2. frames minus their running mean, divided by their running deviation, clamped to ±1;
3. the distillation loss keeps a random share of its elements, 32 / num_envs, which slows the predictor down;
4. advantages are 2 × extrinsic + 1 × novelty + entropy_coef × entropy, not normalised;
5. the row that resets an episode is not experience: no loss and no statistic sees it.

Papers: Pecháč et al. 2023 (SND, arXiv 2302.11563); Burda et al. 2018 (RND, arXiv 1810.12894).
"""

import contextlib
import difflib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import ale_py.roms
import ale_py.vector_env
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models import ActorCritic, make_entropy_encoder, make_predictor, make_target

SCRIPT = Path(__file__).stem

# ---- Arguments ----


@dataclass
class Args:
    # the run
    seed: int = 1
    """seed of the environments, the networks and the sampling"""
    torch_deterministic: bool = True
    """on a GPU, let cuDNN use only deterministic kernels"""
    cuda: bool = True
    """train on the GPU if there is one"""
    compile: bool = False
    """use torch.compile: half a minute at the start, then on a GPU a faster update"""
    bf16: bool = True
    """run the policy in bfloat16 where that is fast, and on a GPU the novelty networks in TF32"""
    track: bool = False
    """also send the metrics to Weights and Biases"""
    wandb_project_name: str = "distillation-exploration"
    """project of Weights and Biases"""
    wandb_entity: str | None = None
    """team of Weights and Biases"""
    run_name: str | None = None
    """folder of the run below runs/; unset: game__script__seed__time"""
    resume: str | None = None
    """folder of a run to go on with, e.g. runs/NAME; its saved arguments are the defaults"""
    checkpoint_interval: int = 100
    """iterations between two checkpoints; there is always one at the start, at the end and when stopped"""

    # the environment
    env_id: str = "MontezumaRevengeNoFrameskip-v4"
    """the game; ALE/MontezumaRevenge-v5 and MontezumaRevenge-v5 mean the same one"""
    env_backend: Literal["envpool", "gymnasium"] = "envpool"
    """EnvPool, or ale-py behind gymnasium's vector interface: as fast, a smaller download, no rooms"""
    total_timesteps: int | float = 128_000_000
    """agent steps of all environments together, 4 emulator frames each; 1e6 works, whole iterations are played"""
    num_envs: int = 128
    """games played side by side"""
    repeat_action_probability: float = 0.25
    """sticky actions: chance at each emulator frame that the last action is repeated"""
    episodic_life: bool = False
    """a lost life ends the learner's episode; the game and its score go on"""

    # PPO
    model: Literal["A", "B", "C", "D"] = "C"
    """architecture of policy and value, see models.py"""
    learning_rate: float = 1e-4
    """learning rate of every Adam optimiser, constant"""
    num_steps: int = 128
    """steps of each game between two updates"""
    gamma: float = 0.998
    """discount of the game's reward"""
    int_gamma: float = 0.99
    """discount of the intrinsic reward"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 32
    """minibatches an epoch; must divide num_envs x num_steps"""
    update_epochs: int = 4
    """passes over each rollout"""
    clip_coef: float = 0.1
    """PPO's clip range of the probability ratio"""
    ent_coef: float = 0.001
    """coefficient of the policy's entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the policy network's gradient"""
    ext_coef: float = 2.0
    """advantage coefficient of the game's reward; 0 trains without any reward of the game"""
    int_coef: float = 1.0
    """advantage coefficient of the intrinsic reward; 0 trains without it"""
    actor_hidden_gain: float = 0.01
    """orthogonal gain of the actor's hidden layer; 1.414 for games without rewards"""
    critic_hidden_gain: float = 0.1
    """orthogonal gain of the critic's hidden layer; 1.414 in some runs of benchmark/montezuma_rnd.sh"""

    # novelty
    norm_obs: Literal["none", "mean", "mean-std"] = "mean-std"
    """the novelty networks' frame: as is, minus the mean, or also divided by std and clamped to ±1"""
    norm_init_steps: int = 256
    """random steps of each game that start the frame statistics"""
    norm_int_reward: bool = False
    """divide the intrinsic reward by the running std of its discounted sum"""
    int_reward_scale: float = 0.5
    """the intrinsic reward is this times the mean squared error of the 512 features, clipped to [0, 1]"""
    int_episodic: bool = False
    """cut the intrinsic return at the end of an episode"""
    update_proportion: float | None = None
    """share of the distillation loss's elements that is kept, in (0, 1]; unset: min(1, 32 / num_envs)"""

    # entropy, the second intrinsic stream
    entropy_coef: float = 1.0
    """advantage coefficient of the entropy reward; 0 trains without it"""
    entropy_gamma: float = 0.99
    """discount of the entropy reward"""
    # Measured on Montezuma's Revenge (model A, 32 envs): with 0.02 this reward is 0.010 to 0.012 from 53 k to 197 k
    # steps, 3 to 7 times the novelty, which a scale of 1 would drown.
    entropy_scale: float = 0.02
    """the entropy reward is this times the mean deviation of the 256 features over the ring, clipped to [0, 1]"""
    entropy_buffer_size: int = 128
    """past states of each environment over which the deviation is taken, at least 2"""


TINY, HUGE = 1e-12, 1e12
LIMITS = {  # the least and the largest value of these flags
    "num_envs num_minibatches update_epochs checkpoint_interval norm_init_steps": (1, HUGE),
    "total_timesteps learning_rate clip_coef max_grad_norm": (TINY, HUGE),
    "entropy_coef entropy_scale": (0, HUGE),
    "entropy_gamma": (0, 1),
    "entropy_buffer_size": (2, HUGE),
    "ent_coef vf_coef ext_coef int_coef int_reward_scale actor_hidden_gain critic_hidden_gain": (0, HUGE),
    "gamma int_gamma gae_lambda repeat_action_probability": (0, 1),
    "update_proportion": (TINY, 1),
    "num_steps": (2, HUGE),  # with one, all rows might be reset rows
    "seed": (0, 2**31 - 1),
}


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on standard error."""
    live = "\r\x1b[K" if sys.stdout.isatty() and sys.stderr.isatty() else ""  # wipes the progress line
    print(f"{live}{SCRIPT}: {message}", file=sys.stderr)
    raise SystemExit(status)


def check_args(args: Args) -> None:
    """Refuse what cannot be trained with, before anything is built; exit status 2."""
    for names, (least, most) in LIMITS.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value <= most:
                fail(f"--{name.replace('_', '-')} {value}: must be from {least:.10g} to {most:.10g}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: must divide --num-envs x --num-steps = {batch_size}")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps}: must be at least --num-envs x --num-steps = {batch_size}")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights and Biases: pip install wandb")
    if args.env_backend == "envpool" and not importlib.util.find_spec("envpool"):
        fail("EnvPool is not installed: pip install envpool, or take --env-backend gymnasium")
    game_of(args)


def parse_args() -> tuple[Args, dict | None]:
    """The arguments and, with --resume, the checkpoint; exit status 2 if they are wrong."""
    switches = [f"--{field.name.replace('_', '-')}" for field in fields(Args) if field.type is bool]
    for flag, value in itertools.pairwise(sys.argv):
        if flag in switches and value.lower() in ("true", "false"):
            fail(f"{flag} {value}: a switch takes no value, write {flag} or --no-{flag[2:]}")
    cli = partial(tyro.cli, Args, description=__doc__.splitlines()[0])
    args, checkpoint = cli(), None
    if args.resume is not None:
        checkpoint = load_checkpoint(Path(args.resume))
        args = cli(default=replace(checkpoint["args"], resume=args.resume))
    check_args(args)
    args.total_timesteps = int(args.total_timesteps)  # 1e6 is a float
    return args, checkpoint


# ---- Environment ----

MAX_EPISODE_STEPS = 4500  # 18,000 emulator frames
ROMS = {  # the games in EnvPool's spelling, such as MontezumaRevenge, and their names in ale-py
    "".join(word.capitalize() for word in rom.split("_")): rom
    for rom in ale_py.roms.get_all_rom_ids()
    if rom not in ("combat", "joust", "maze_craze", "warlords")  # which need two players
}


def game_of(args: Args) -> str:
    """The game's name, one of ROMS; exit status 2 if there is no such game."""
    match = re.fullmatch(r"(\w+?)NoFrameskip-v4|(?:ALE/)?(\w+)-v5", args.env_id)
    name = match and (match[1] or match[2])
    if name in ROMS:
        return name
    near = difflib.get_close_matches(name or args.env_id, ROMS) or ["MontezumaRevenge"]
    near = " or ".join(f"{game}NoFrameskip-v4" for game in near)
    fail(f"--env-id {args.env_id}: no Atari game of that name; did you mean {near}?")


def make_envs(args: Args, seed: int, num_envs: int) -> tuple[Any, np.ndarray, dict]:
    """A vector environment with `send` and `recv`, its first observations and info; game i has the seed + i.

    Observations (num_envs, 4, 96, 96) uint8: grey, newest frame last, frame skip 4 with the maximum of the last two. Up
    to 30 no-ops and FIRE at the start, true rewards, next-step resets.
    """
    options = dict(num_envs=num_envs, img_height=96, img_width=96)
    options["repeat_action_probability"] = args.repeat_action_probability
    if args.env_backend == "envpool":
        import envpool

        options |= dict(seed=seed, max_episode_steps=MAX_EPISODE_STEPS, episodic_life=args.episodic_life)
        envs = envpool.make(f"{game_of(args)}-v5", env_type="gymnasium", **options)
        return envs, *envs.reset()
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    options |= dict(max_num_frames_per_episode=4 * MAX_EPISODE_STEPS, reward_clipping=False)
    envs = ale_py.vector_env.AtariVectorEnv(ROMS[game_of(args)], **options)
    return envs, *envs.reset(seed=seed)


ROOM_BYTE = {"Pitfall": 1, "PrivateEye": 92, "Venture": 90}  # where the game keeps the number of the room
ROOM_GAMES = {"MontezumaRevenge", "Gravitar", "Solaris", *ROOM_BYTE}


def rooms_of(game: str, ram: np.ndarray, last_ram: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Room ids (N,) int of the games of which `ram` (N, 128) uint8 is the memory; -1 where it tells none.

    `last_ram` is the memory one step earlier; `first` (N,) bool marks the first observation of an episode.
    """
    ram = ram.astype(int)
    if game == "MontezumaRevenge":
        return ram[:, 3] + 24 * ram[:, 57]  # room, level
    if game == "Gravitar":  # modes: 2 overview, 3 planet, 4 reactor, 5 saucer fight; any other shows no place
        mode, place = ram[:, 1], np.where(ram[:, 1] == 3, ram[:, 2] & 0x0F, ram[:, 2] & 0x0C)
        return np.where((mode >= 2) & (mode <= 5), 16 * mode + place, -1)
    if game == "Solaris":  # while the scanner is open the sector follows the cursor, so read it as a warp ends
        warped = (last_ram[:, 13] == 16) & (ram[:, 13] != 16)
        return np.where(first | warped, 64 * ram[:, 77] + ram[:, 8], -1)
    return ram[:, ROOM_BYTE[game]]


class AtariEnvs:
    """N games side by side on either backend, and their scores and rooms.

    The step after an episode's end ignores its action and returns the next episode's first observation. That is a
    *reset row*: its input is the true final observation of the finished episode, and it is not experience.

    Attributes:
        groups: slices of the N games; some groups play while the network looks at another.
        next_obs: of each group, (size of the group, 4, 96, 96) uint8.
        infos: of each group, what the backend told last: lives, on EnvPool ram (size of the group, 128) uint8.
        resets: (N,) bool, True where the next row is a reset row.
        rooms: ids of the rooms seen; empty where the game or the backend tells none.
        finished: (true score, agent steps) of each game that has ended; to be emptied by the reader.
    """

    def __init__(self, args: Args, seed: int, num_groups: int = 1):
        self.game, n = game_of(args), args.num_envs
        edges = np.linspace(0, n, min(n, num_groups) + 1).astype(int).tolist()
        self.groups = [slice(*edge) for edge in itertools.pairwise(edges)]
        made = [make_envs(args, seed + games.start, games.stop - games.start) for games in self.groups]
        self.envs, self.next_obs, self.infos = map(list, zip(*made, strict=True))
        self.num_actions = int(self.envs[0].single_action_space.n)
        self.resets = np.zeros(n, bool)
        self.scores, self.lengths, self.finished = np.zeros(n), np.zeros(n, int), []
        # EnvPool itself ends an episode at a lost life and goes on after a reset row; ALE would start a new game.
        self.watch_lives = args.episodic_life and args.env_backend == "gymnasium"
        self.rooms, self.knows_rooms = set(), self.game in ROOM_GAMES and args.env_backend == "envpool"
        for info in self.infos:
            self.enter_rooms(info, info, np.ones(len(info["lives"]), bool))

    def enter_rooms(self, info: dict, last: dict, first: np.ndarray) -> None:
        """Add a group's rooms to `rooms`; `info` and `last` are the backend's, now and a step earlier."""
        if self.knows_rooms:
            self.rooms |= set(rooms_of(self.game, info["ram"], last["ram"], first).tolist()) - {-1}

    def send(self, group: int, actions: np.ndarray) -> None:
        """Start a step of a group's games with actions (size of the group,) int32."""
        self.envs[group].send(actions)

    def recv(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """End a group's step; returns its true rewards, and `terminated` and `done` bool."""
        games, last = self.groups[group], self.infos[group]
        self.next_obs[group], rewards, terminated, truncated, info = self.envs[group].recv()
        self.infos[group] = info
        was_reset = self.resets[games].copy()
        self.resets[games] = terminated | truncated  # not where ALE's game goes on after a lost life
        # EnvPool's `terminated` marks lost lives, too, and misses a game over in the last permitted step; info's is
        # the end of the game itself.
        game_over = info.get("terminated", terminated).astype(bool)
        terminated = terminated | game_over
        if self.watch_lives:
            terminated |= (info["lives"] > 0) & (info["lives"] < last["lives"]) & ~was_reset & ~truncated
        self.scores[games] += rewards
        self.lengths[games] += ~was_reset
        ended = games.start + np.flatnonzero(game_over | truncated)
        self.finished += zip(self.scores[ended].tolist(), self.lengths[ended].tolist(), strict=True)
        self.scores[ended] = self.lengths[ended] = 0
        self.enter_rooms(info, last, was_reset)
        return rewards, terminated, terminated | truncated


# ---- What learns ----


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows ever given to `update`, by Chan's parallel formula, float64."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add the rows of x, (rows, *shape) float32; only the statistics are float64, not the rows."""
        mean = x.mean(dim=0)
        var = (x - mean).square_().mean(dim=0)  # on a CPU a fifth of torch.var_mean's time
        total = self.count + len(x)
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * len(x) + delta.square() * self.count * len(x) / total) / total)
        self.mean += delta * len(x) / total
        self.count.copy_(total)


class Learner(nn.Module):
    """All that learns or is learned from; its state_dict and its optimisers' go into the checkpoint."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        super().__init__()
        num_values = len(advantage_coefs(args))
        self.agent = ActorCritic(args.model, num_actions, num_values, args.actor_hidden_gain, args.critic_hidden_gain)
        self.target = make_target()
        self.predictor = make_predictor()
        self.encoder = make_entropy_encoder()
        self.obs_stats = RunningMeanStd((1, 96, 96))
        if args.norm_int_reward:
            self.register_buffer("int_return", torch.zeros(args.num_envs))  # discounted sum so far
            self.int_return_stats = RunningMeanStd()
        self.to(device, memory_format=torch.channels_last)
        if args.compile:
            torch._dynamo.config.recompile_limit = 32  # the novelty networks share one forward, and so one count
            for network in (self.agent, self.target, self.predictor, self.encoder):
                network.compile(dynamic=False)  # the few batch shapes never change
        # `recorded` wants capturable and, as learning rates, tensors: a schedule fills them in place.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")
        self.optimizers = {}
        for name in ("agent", "predictor", "target", "encoder"):
            parameters, lr = getattr(self, name).parameters(), torch.tensor(args.learning_rate, device=device)
            self.optimizers[name] = torch.optim.Adam(parameters, lr, fused=True, capturable=device.type == "cuda")


@dataclass
class Rollout:
    """T = num_steps rows of N = num_envs environments; row t's action was chosen on obs[t] and led to obs[t + 1]."""

    obs: Tensor  # (T + 1, N, 4, 96, 96) uint8, overwritten by the next rollout
    actions: Tensor  # (T, N) int64
    logprobs: Tensor  # (T, N) float32
    values: Tensor  # (T + 1, N, value heads) float32
    ext_rewards: Tensor  # (T, N) float32, the sign of the game's reward
    terminations: Tensor  # (T, N) bool, the episode ended for good: nothing to bootstrap from
    dones: Tensor  # (T, N) bool, terminated or truncated by this action (CleanRL's dones[t + 1])
    valid: Tensor  # (T, N) bool, False on reset rows
    valid_inds: Tensor  # (number of valid rows,) int64, into the T × N rows


# ---- Acting ----


def autocast(args: Args, device: torch.device) -> torch.autocast:
    """bfloat16 for the policy, in rollout and update alike, where the hardware multiplies it fast.

    Never for novelty: an RND reward of 1e-3 comes out up to 63 % wrong in bfloat16, 0.6 % in TF32 (see main).
    """
    on_gpu = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    # No cache of the cast weights: a recording would not notice that they change.
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and fast, cache_enabled=False)


@torch.no_grad()
def act(learner: Learner, args: Args, obs: Tensor) -> dict[str, Tensor]:
    """Actions (batch,) int64, their logprobs (batch,) and the values (batch, heads) of obs (batch, 4, 96, 96) uint8."""
    with autocast(args, obs.device):
        logits, values = learner.agent(obs)
    # The Gumbel trick; torch.distributions would check its arguments and so wait for a GPU.
    actions = (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1)
    logprobs = logits.log_softmax(dim=1).gather(1, actions[:, None])[:, 0]
    return {"actions": actions, "logprobs": logprobs, "values": values}


def collect_rollout(envs: AtariEnvs, act_step: Callable, obs: Tensor, args: Args) -> Rollout:
    """Play `num_steps` steps of every environment; fills obs (T + 1, N, 4, 96, 96) uint8.

    One forward pass a step. Row T is not played; its values are there to bootstrap from.
    """
    device, shape = obs.device, (args.num_steps, args.num_envs)
    actions, logprobs = torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device)
    values = torch.empty(args.num_steps + 1, args.num_envs, len(advantage_coefs(args)), device=device)
    rewards = np.empty(shape, np.float32)
    terminations, dones, valid = (np.empty(shape, bool) for _ in range(3))
    for t in range(args.num_steps + 1):
        for group, games in enumerate(envs.groups):  # while the network looks at one, the others play
            if t > 0:
                rewards[t - 1, games], terminations[t - 1, games], dones[t - 1, games] = envs.recv(group)
            obs[t, games] = torch.from_numpy(envs.next_obs[group])
            chosen = act_step(obs=obs[t, games])
            values[t, games] = chosen["values"]
            if t < args.num_steps:
                actions[t, games], logprobs[t, games] = chosen["actions"], chosen["logprobs"]
                valid[t, games] = ~envs.resets[games]
                envs.send(group, chosen["actions"].to("cpu", torch.int32).numpy())
    played = dict(ext_rewards=np.sign(rewards), terminations=terminations, dones=dones)
    played |= dict(valid=valid, valid_inds=np.flatnonzero(valid))
    on_device = {name: torch.from_numpy(x).to(device) for name, x in played.items()}
    return Rollout(obs, actions, logprobs, values, **on_device)


# ---- Novelty ----

CHUNK = 512  # rows at a time where no gradient is needed, to save memory


def init_obs_stats(obs_stats: RunningMeanStd, args: Args, seed: int) -> None:
    """Start the frame statistics with `norm_init_steps` random steps of games of their own."""
    envs, rng = AtariEnvs(args, seed), np.random.default_rng(seed)
    for _ in range(args.norm_init_steps):
        frames = torch.from_numpy(envs.next_obs[0][~envs.resets, -1:])  # not the input of a reset row
        if len(frames):
            obs_stats.update(frames.to(obs_stats.mean.device).float().div_(256))
        envs.send(0, rng.integers(envs.num_actions, size=args.num_envs, dtype=np.int32))
        envs.recv(0)


def update_obs_stats(obs_stats: RunningMeanStd, rollout: Rollout) -> None:
    """Add the newest frames of a rollout's valid rows."""
    newest = rollout.obs.flatten(0, 1)[:, -1:]
    for inds in rollout.valid_inds.split(CHUNK):
        obs_stats.update(newest.index_select(0, inds).float().div_(256))


def novelty_input(obs: Tensor, obs_stats: RunningMeanStd, norm_obs: str) -> Tensor:
    """The newest frame of obs (batch, 4, 96, 96) uint8, normalised: (batch, 1, 96, 96) float32."""
    x = obs[:, -1:].float().div_(256)
    if norm_obs != "none":
        x.sub_(obs_stats.mean.float())
    if norm_obs == "mean-std":
        # A pixel that never changed has std 0. Our choice: divide by no less than one grey level.
        x.div_(obs_stats.var.sqrt().float().clamp(min=1 / 256)).clamp_(-1, 1)
    return x


def novelty(target_features: Tensor, predictor_features: Tensor, scale: float) -> Tensor:
    """Intrinsic reward (batch,) of features (batch, 512): scale * mean squared error, clipped to [0, 1]."""
    return (scale * (target_features - predictor_features).square().mean(dim=1)).clamp(0, 1)


@torch.no_grad()
def intrinsic_rewards(learner: Learner, rollout: Rollout, args: Args) -> Tensor:
    """Novelty (T, N) of every row's *next* observation, 0 on reset rows."""
    rewards = []
    for obs in rollout.obs[1:].flatten(0, 1).split(CHUNK):
        x = novelty_input(obs, learner.obs_stats, args.norm_obs)
        rewards.append(novelty(learner.target(x), learner.predictor(x), args.int_reward_scale))
    rewards = torch.cat(rewards).view_as(rollout.valid) * rollout.valid
    if args.norm_int_reward:
        # By the deviation of the discounted sum over time, not over games (Burda et al. 2018, 2.4). As in `gae`, a
        # reset row pays nothing, but time goes by; its sum does not count.
        int_returns = [learner.int_return.mul_(args.int_gamma).add_(row).clone() for row in rewards]
        learner.int_return_stats.update(torch.stack(int_returns)[rollout.valid])
        rewards = rewards / learner.int_return_stats.var.sqrt().float().clamp(min=1e-8)
    return rewards


class FeatureRing:
    """The last `size` features of each environment; at an episode's start all of them are the first one.

    Our choice, not the design's: what the encoder learns between rollouts does not count as change, so `begin` shifts
    the whole ring by what the new encoder makes of the last state. Without that, in Breakout, a picture that stands
    still was paid for deviations of 0.64 to 0.84, more than play, which has 0.35 to 0.44 where one encoder sees it all.
    """

    def __init__(self, size: int):
        self.size, self.slot, self.ring = size, 0, None  # ring (size, N, dims) float32

    def begin(self, features: Tensor) -> None:
        """Features (N, dims) of a rollout's row 0: of new games, or of the states pushed last, encoded anew."""
        if self.ring is None:
            self.ring = features.repeat(self.size, 1, 1)
        self.ring += features - self.ring[self.slot - 1]

    def push(self, features: Tensor, starts: Tensor) -> Tensor:
        """Add features (N, dims); `starts` (N,) bool marks an episode's first. Returns the deviations (N, dims)."""
        self.ring[self.slot] = features
        self.ring[:, starts] = features[starts]
        self.slot = (self.slot + 1) % self.size
        return self.ring.std(dim=0)


@torch.no_grad()
def entropy_rewards(learner: Learner, rollout: Rollout, ring: FeatureRing, args: Args) -> Tensor:
    """The second intrinsic stream (T, N): entropy_scale * mean deviation of recent features, clipped to [0, 1].

    Like novelty it is that of every row's *next* observation, 0 on reset rows. Only these begin a ring anew: a life
    lost with --episodic-life does so on EnvPool.
    """
    features = [learner.encoder(obs.float().div_(256)) for obs in rollout.obs.flatten(0, 1).split(CHUNK)]
    features = torch.cat(features).unflatten(0, rollout.obs.shape[:2])  # (T + 1, N, 256)
    ring.begin(features[0])
    # Row t leads to the first observation of an episode where it is a reset row.
    deviations = [ring.push(features[t + 1], ~rollout.valid[t]).mean(dim=1) for t in range(args.num_steps)]
    return (args.entropy_scale * torch.stack(deviations)).clamp(0, 1) * rollout.valid


# ---- Advantages ----


def advantage_coefs(args: Args) -> list[float]:
    """The weight of each reward stream, one per value head; a head with weight 0 is not trained."""
    return [args.ext_coef, args.int_coef, args.entropy_coef]


def gae(
    rewards: Tensor, values: Tensor, terminations: Tensor, dones: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) with true final observations.

    rewards, terminations, dones are (T, N), values (T + 1, N); returns the advantages (T, N). `terminations` cut the
    bootstrap from the next value, `dones` the flow of later advantages. Because the row after an end holds the final
    observation, its value is the right bootstrap of a truncated episode.
    """
    advantages = rewards + gamma * values[1:] * ~terminations - values[:-1]  # one-step errors
    decay = gamma * gae_lambda * ~dones
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def estimate_advantages(
    rollout: Rollout, int_rewards: Tensor, ent_rewards: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """The combined advantages (T, N) and each value head's returns (T, N, heads).

    The game's stream is episodic. An intrinsic one is not: without ends it flows through reset rows, whose reward is 0.
    """
    ends = [rollout.terminations, rollout.dones]
    int_ends = [end & args.int_episodic for end in ends]  # by default nowhere True
    ext_values, int_values, ent_values = rollout.values.unbind(dim=-1)
    ext_advantages = gae(rollout.ext_rewards, ext_values, *ends, args.gamma, args.gae_lambda)
    int_advantages = gae(int_rewards, int_values, *int_ends, args.int_gamma, args.gae_lambda)
    ent_advantages = gae(ent_rewards, ent_values, *int_ends, args.entropy_gamma, args.gae_lambda)
    advantages = args.ext_coef * ext_advantages + args.int_coef * int_advantages + args.entropy_coef * ent_advantages
    return advantages, torch.stack([ext_advantages, int_advantages, ent_advantages], dim=-1) + rollout.values[:-1]


def explained_variance(rollout: Rollout, advantages: Tensor, returns: Tensor, args: Args) -> Tensor:
    """Share of the variance of the coefficient-weighted returns that the values explain, over the valid rows."""
    weighted = (returns @ returns.new_tensor(advantage_coefs(args)))[rollout.valid]
    errors = advantages[rollout.valid]  # the weighted returns less the weighted values
    return 1 - errors.var(correction=0) / weighted.var(correction=0).clamp(min=1e-8)


# ---- Learning ----


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float = torch.inf) -> None:
    """One gradient step on a scalar loss, the gradient's norm clipped to `max_grad_norm`."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm < torch.inf:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


def ppo_loss(
    agent: ActorCritic,
    args: Args,
    obs: Tensor,
    actions: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    valid: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective, the value heads' squared error and the entropy bonus, over the valid rows.

    obs (batch, 4, 96, 96) uint8, returns (batch, heads), the rest (batch,). Returns the loss and, detached, its parts
    and how far the policy has moved.
    """
    logits, values = agent(obs)
    weights = valid / valid.sum().clamp(min=1)  # a reset row weighs 0; the shape of a minibatch never changes
    all_logprobs = logits.log_softmax(dim=1)
    logratio = all_logprobs.gather(1, actions[:, None])[:, 0] - logprobs
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = (torch.max(-advantages * ratio, -advantages * clipped) * weights).sum()
    errors = (values - returns).square()  # (batch, heads)
    trained = [errors[:, i] for i, coef in enumerate(advantage_coefs(args)) if coef > 0]
    value_loss = (sum(trained, torch.zeros_like(weights)) * weights).sum()
    entropy = (-(all_logprobs.exp() * all_logprobs).sum(dim=1) * weights).sum()
    losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    losses["approx_kl"] = ((ratio - 1 - logratio) * weights).sum()  # http://joschu.net/blog/kl-approx.html
    losses["clipfrac"] = (((ratio - 1).abs() > args.clip_coef) * weights).sum()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, {name: x.detach() for name, x in losses.items()}


def train_policy(learner: Learner, args: Args, **minibatch: Tensor) -> dict[str, Tensor]:
    """One step of the policy and the values on a minibatch, the tensors of ppo_loss; returns its losses."""
    with autocast(args, minibatch["obs"].device):
        loss, losses = ppo_loss(learner.agent, args, **minibatch)
    descend(learner.optimizers["agent"], loss, args.max_grad_norm)
    return losses


NUM_PAIRS = 64  # pairs of states in each step of the contrastive loss


def draw_pairs(valid_inds: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """The rows of the states A and B of `num_pairs` pairs, A first (2 * num_pairs,) int64, and the pairs' labels.

    Label 0: B is A. Label 1, with probability 1/2: B is another state, drawn uniformly. labels (num_pairs,) float32.
    """
    n, device = len(valid_inds), valid_inds.device
    a = torch.randint(n, (num_pairs,), device=device)
    other = (a + 1 + torch.randint(max(n - 1, 1), (num_pairs,), device=device)) % n
    labels = torch.randint(2, (num_pairs,), device=device)
    return valid_inds[torch.cat([a, torch.where(labels == 1, other, a)])], labels.float()


def augment(x: Tensor) -> Tensor:
    """Random views of x (batch, frames, 96, 96) float32, each sample on its own; the same shape.

    In this order: 2×2 mean blocks with probability 1/2, 4×4 with 1/4, a tenth of the pixels to zero with 1/8, and
    always uniform noise of ±0.2.
    """

    def chance(p: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < p

    x = torch.where(chance(1 / 2), F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), x)
    x = torch.where(chance(1 / 4), F.interpolate(F.avg_pool2d(x, 4), scale_factor=4), x)
    x = torch.where(chance(1 / 8) & (torch.rand_like(x) < 0.1), 0.0, x)
    return x + 0.4 * torch.rand_like(x) - 0.2


def contrastive_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Mean of (label - d)^2, where d is the mean squared difference of a pair's features (SND's target, MSE variant).

    features (2 * pairs, dims): the states A, then the states B; labels (pairs,): 0 same state, 1 different.
    """
    a, b = features.chunk(2)
    return (labels - (a - b).square().mean(dim=1)).square().mean()


def distillation_loss(
    predictor_features: Tensor, target_features: Tensor, valid: Tensor, update_proportion: float
) -> Tensor:
    """Mean squared error over a random share of the elements of features (batch, 512); reset rows are left out."""
    keep = valid[:, None].expand_as(target_features)
    if update_proportion < 1:
        keep = keep & (torch.rand_like(target_features) < update_proportion)
    return ((predictor_features - target_features).square() * keep).sum() / keep.sum().clamp(min=1)


def train_novelty(
    learner: Learner, args: Args, obs: Tensor, valid: Tensor, pair_obs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One step of the target and of the encoder on pairs of states, then one of the predictor on a minibatch.

    pair_obs (2 * NUM_PAIRS, 4, 96, 96) uint8, labels (NUM_PAIRS,); obs (batch, 4, 96, 96) uint8, valid (batch,) bool.
    """
    pairs = augment(novelty_input(pair_obs, learner.obs_stats, args.norm_obs))
    contrastive = contrastive_loss(learner.target(pairs), labels)
    descend(learner.optimizers["target"], contrastive)

    raw_pairs = augment(pair_obs.float() / 256)
    contrastive_entropy = contrastive_loss(learner.encoder(raw_pairs), labels)
    descend(learner.optimizers["encoder"], contrastive_entropy)

    x = novelty_input(obs, learner.obs_stats, args.norm_obs)
    with torch.no_grad():
        target_features = learner.target(x)
    update_proportion = args.update_proportion or min(1, 32 / args.num_envs)
    distillation = distillation_loss(learner.predictor(x), target_features, valid, update_proportion)
    descend(learner.optimizers["predictor"], distillation)
    losses = {"distillation": distillation, "contrastive": contrastive, "contrastive_entropy": contrastive_entropy}
    return {name: x.detach() for name, x in losses.items()}


def update(
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    policy_step: Callable[..., dict],
    novelty_step: Callable[..., dict],
    args: Args,
) -> dict[str, Tensor]:
    """Train on a rollout, advantages (T, N), returns (T, N, heads); the mean losses, still on the device."""
    batch = {"obs": rollout.obs[:-1], "actions": rollout.actions, "logprobs": rollout.logprobs}
    batch |= {"advantages": advantages, "returns": returns, "valid": rollout.valid}
    batch = {name: x.flatten(0, 1) for name, x in batch.items()}
    losses = []
    for _ in range(args.update_epochs):
        b_inds = torch.randperm(args.num_envs * args.num_steps, device=rollout.obs.device)
        for mb_inds in b_inds.chunk(args.num_minibatches):
            # On a CPU index_select copies frames in a sixth of the time of indexing.
            minibatch = {name: x.index_select(0, mb_inds) for name, x in batch.items()}
            pair_inds, labels = draw_pairs(rollout.valid_inds, NUM_PAIRS)
            pair_obs = batch["obs"].index_select(0, pair_inds)
            states = {"obs": minibatch["obs"], "valid": minibatch["valid"], "pair_obs": pair_obs, "labels": labels}
            both = partial(policy_step, **minibatch), partial(novelty_step, **states)
            losses.append(side_by_side(*both, rollout.obs.device))
    return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}


# ---- Speed on a GPU ----


def recorded(function: Callable, device: torch.device) -> Callable:
    """On a GPU, record the kernels of `function(**tensors)`, which returns named tensors, and replay them as one.

    For each set of shapes the first call runs the function, which sets up libraries and optimisers, the second records
    it (a CUDA graph), later ones replay it without Python. So what changes from call to call is one of `tensors` or is
    changed in place, nothing inside waits for the device, and what is returned is detached. To debug, return the
    function itself, as on a CPU.
    """
    if device.type == "cpu":
        return function
    recordings = {}  # shapes -> None after one call, then (graph, its inputs, its outputs)

    def replay(**tensors: Tensor) -> dict[str, Tensor]:
        shapes = tuple(x.shape for x in tensors.values())
        if shapes not in recordings:
            recordings[shapes] = None
            return function(**tensors)
        if recordings[shapes] is None:  # recording runs no kernel, so this call goes on to the replay
            graph, inputs = torch.cuda.CUDAGraph(), {name: x.clone() for name, x in tensors.items()}
            # Its own stream: cuBLAS has one workspace a stream, which recordings that run side by side must not share.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                recordings[shapes] = graph, inputs, function(**inputs)
        graph, inputs, outputs = recordings[shapes]
        for name, x in tensors.items():
            inputs[name].copy_(x)
        graph.replay()
        return {name: x.clone() for name, x in outputs.items()}  # for the next replay overwrites them

    return replay


side_stream = cache(torch.cuda.Stream)  # a second queue of kernels, made once


def side_by_side(one: Callable, other: Callable, device: torch.device) -> dict[str, Tensor]:
    """The named tensors of two calls, on a GPU at the same time; of recordings only `other` may draw random numbers."""
    if device.type == "cpu":
        return one() | other()
    main_stream = torch.cuda.current_stream()
    side_stream().wait_stream(main_stream)
    with torch.cuda.stream(side_stream()):
        results = other()
    results = one() | results
    main_stream.wait_stream(side_stream())
    return results


# ---- Checkpoints and logs ----


def save_checkpoint(run_dir: Path, args: Args, learner: Learner, counters: dict) -> None:
    """Write checkpoint.pt; a kill at any instant leaves the old one or the new one. Exit status 1 on broken weights."""
    if not nn.utils.get_total_norm(learner.parameters()).isfinite():
        fail(f"a weight is not finite; the last good checkpoint is kept in {run_dir}", status=1)
    checkpoint = {"script": SCRIPT, "args": asdict(args) | {"resume": None}, "counters": counters}
    checkpoint["learner"] = learner.state_dict()
    checkpoint["optimizers"] = {name: optimizer.state_dict()["state"] for name, optimizer in learner.optimizers.items()}
    device = next(learner.parameters()).device.type
    checkpoint["random"] = {device: (torch.cuda if device == "cuda" else torch).get_rng_state()}
    with open(run_dir / "checkpoint.tmp", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def load_checkpoint(run_dir: Path) -> dict:
    """A checkpoint of this script, its tensors on the CPU, its arguments as Args; exit status 2 if it is none."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"{checkpoint['script']} wrote it")
        if "global_step" not in checkpoint["counters"]:
            raise ValueError("an older version wrote it")
        return checkpoint | {"args": Args(**checkpoint["args"])}
    except (FileNotFoundError, NotADirectoryError):
        fail(f"--resume {run_dir}: give the folder of a run, with its checkpoint.pt")
    except Exception as error:  # whatever a broken or foreign file makes the reader raise
        fail(f"{run_dir / 'checkpoint.pt'} is not a checkpoint of {SCRIPT}: {one_line(error)}")


def restore(learner: Learner, checkpoint: dict) -> None:
    """Put a checkpoint into the learner and the random generator; exit status 2 if it does not fit."""
    try:
        learner.load_state_dict(checkpoint["learner"])
        for name, optimizer in learner.optimizers.items():  # the moments only: settings come from the flags
            optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizers"][name]})
        for device, state in checkpoint["random"].items():
            if device == next(learner.parameters()).device.type:
                (torch.cuda if device == "cuda" else torch).set_rng_state(state)
    except Exception as error:
        fail(f"the checkpoint does not fit these arguments: {one_line(error)}")


def one_line(error: Exception) -> str:
    """What went wrong; torch writes many lines, with advice before the cause."""
    return " ".join(str(error).split("WeightsUnpickler error: ")[-1].split())[:200] or repr(error)


def make_writer(run_dir: Path, args: Args, global_step: int) -> SummaryWriter:
    """TensorBoard's writer, and Weights and Biases with --track; what was logged after `global_step` is hidden."""
    if args.track:
        import wandb

        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=args.run_name)
        names["id"] = re.sub(r"\W", "-", args.run_name)  # which a resumed run keeps
        wandb.init(**names, resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(str(run_dir), purge_step=global_step + 1)
    rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", global_step)
    return writer


def log(writer: SummaryWriter, scalars: dict[str, float | Tensor], global_step: int) -> None:
    """Write {tag: value} to the disk; exit status 1 if a value is not finite."""
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, global_step)
    writer.flush()
    for tag, value in scalars.items():
        if not np.isfinite(float(value)):
            fail(
                f"step {global_step}: {tag} is {value}; the last good checkpoint is kept in {writer.log_dir}", status=1
            )


class Progress:
    """What the run is doing: one live line in a terminal, elsewhere a plain line every half minute."""

    def __init__(self, args: Args, global_step: int):
        self.total, self.first_step, self.start, self.printed = args.total_timesteps, global_step, time.time(), 0.0
        self.numbers = f"{global_step:,} / {self.total:,} steps"

    def count(self, global_step: int, scores: deque, rooms: set, int_reward: float) -> None:
        """Set the numbers: steps, steps/s, time left, mean score of the last 100 games, rooms, intrinsic reward."""
        rate = (global_step - self.first_step) / (time.time() - self.start)
        left = timedelta(seconds=int((self.total - global_step) / rate))
        score = f"{np.mean(scores):,.1f}" if scores else "-"
        self.numbers = f"{global_step:,} / {self.total:,} steps | {rate:,.0f} steps/s | {left} left | return {score}"
        self.numbers += f"{f' | rooms {len(rooms)}' if rooms else ''} | r_int {int_reward:.4f}"

    def show(self, doing: str, final: bool = False) -> None:
        """Print what is being done and the numbers."""
        line, end = f"{doing} | {self.numbers}", "\n"
        if sys.stdout.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be rewritten
            line, end = f"\r{line}\x1b[K", "\n" if final else ""
        elif not final and time.time() - self.printed < 30:
            return
        self.printed = time.time()
        try:
            print(line, end=end, flush=True)
        except OSError:  # the terminal or `tee` has gone, which must not cost a checkpoint: print nowhere from now on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def catch_stop_signals() -> list[int]:
    """A list that receives the first SIGTERM or Ctrl-C, to look at between iterations; the next one kills at once."""
    caught = []
    stops = (signal.SIGINT, signal.SIGTERM)

    def catch(number: int, _frame: object) -> None:
        caught.append(number)
        for stop in stops:
            signal.signal(stop, signal.SIG_DFL)
        # os.write, for print may be at work below this handler and cannot be entered twice.
        with contextlib.suppress(OSError):  # Ctrl-C has ended `tee`, too
            os.write(2, b"\nstopping: waiting for this iteration to end, then saving; once more stops at once\n")

    for stop in stops:
        signal.signal(stop, catch)
    return caught


# ---- Main ----

# Played without learning when a run is resumed, for its new games begin all at once, and networks that see nothing but
# beginnings forget the rest: in Breakout SND's value loss rose sixfold, with these by half.
WARM_UP_ROLLOUTS = 8


def main() -> None:
    args, checkpoint = parse_args()
    counters = checkpoint["counters"] if checkpoint else {"global_step": 0, "rooms": [], "scores": []}
    global_step, batch_size = counters["global_step"], args.num_envs * args.num_steps
    num_iterations = (args.total_timesteps - global_step) // batch_size
    args.run_name = args.run_name or f"{game_of(args)}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or f"runs/{args.run_name}")
    if num_iterations <= 0:
        print(f"{run_dir} is finished: {global_step:,} steps; to go on, raise --total-timesteps")
        return
    if checkpoint is None and os.path.exists(run_dir / "checkpoint.pt"):
        fail(f"{run_dir} holds a run already: go on with --resume {run_dir}, or choose another --run-name")

    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    print(f"{run_dir}: {game_of(args)}, {num_iterations:,} iterations of {batch_size:,} steps on {device}", flush=True)
    if device.type == "cpu":
        print("on a CPU, --model A --num-envs 32 is a good size; beside other runs, set OMP_NUM_THREADS=1", flush=True)
    else:
        torch.set_num_threads(1)  # more would wait actively and take the processors from the emulators
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.bf16
    # Emulators cannot be saved: a resumed run starts new games, from seeds of their own (30 bits: game i adds i).
    env_seed = int(np.random.SeedSequence([args.seed, global_step]).generate_state(1)[0] >> 2)
    torch.manual_seed(args.seed + global_step)
    envs = AtariEnvs(args, env_seed, num_groups=3 if device.type == "cuda" else 1)
    learner = Learner(args, envs.num_actions, device)
    act_step, policy_step, novelty_step = (
        recorded(partial(function, learner, args), device) for function in (act, train_policy, train_novelty)
    )
    obs = torch.zeros(args.num_steps + 1, args.num_envs, 4, 96, 96, dtype=torch.uint8, device=device)
    ring = FeatureRing(args.entropy_buffer_size)
    if checkpoint is None:
        print(f"frame statistics: {args.norm_init_steps} random steps of each game", flush=True)
        init_obs_stats(learner.obs_stats, args, env_seed)
    else:
        restore(learner, checkpoint)
        print(f"warming up: {WARM_UP_ROLLOUTS} x {args.num_steps} steps of each game without learning", flush=True)
        for _ in range(WARM_UP_ROLLOUTS):
            entropy_rewards(learner, collect_rollout(envs, act_step, obs, args), ring, args)
        envs.rooms = set(counters["rooms"])
        envs.finished.clear()
    scores, progress = deque(counters["scores"], maxlen=100), Progress(args, global_step)

    stop = catch_stop_signals()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {run_dir}: {error.strerror}")
    writer = make_writer(run_dir, args, global_step)
    if checkpoint is None:
        save_checkpoint(run_dir, args, learner, counters)
    for iteration in range(1, num_iterations + 1):
        start = time.time()
        # 1. Play T steps of N games; row T only bootstraps
        progress.show("playing")
        rollout = collect_rollout(envs, act_step, obs, args)
        # 2. Reward the novelty of each next observation, and trajectories that keep changing
        progress.show("learning")
        update_obs_stats(learner.obs_stats, rollout)
        int_rewards = intrinsic_rewards(learner, rollout, args)
        ent_rewards = entropy_rewards(learner, rollout, ring, args)
        # 3. The game's stream is episodic; the others flow on across the ends of episodes
        advantages, returns = estimate_advantages(rollout, int_rewards, ent_rewards, args)
        # 4. PPO, and beside it contrast target and encoder and distil the predictor
        losses = update(rollout, advantages, returns, policy_step, novelty_step, args)
        # 5. Log and save
        global_step += batch_size
        scalars = {f"losses/{name}": loss for name, loss in losses.items()}
        scalars["losses/explained_variance"] = explained_variance(rollout, advantages, returns, args)
        scalars["charts/intrinsic_reward"] = int_rewards[rollout.valid].mean()
        scalars["charts/intrinsic_reward_std"] = int_rewards[rollout.valid].std(correction=0)
        scalars["charts/entropy_reward"] = ent_rewards[rollout.valid].mean()
        scalars["charts/learning_rate"] = learner.optimizers["agent"].param_groups[0]["lr"]
        if envs.finished:
            finished = np.array(envs.finished)  # (games, 2)
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = finished.mean(axis=0)
            scores.extend(finished[:, 0].tolist())
            envs.finished.clear()
        if envs.rooms:
            scalars["charts/explored_rooms"] = len(envs.rooms)
        # The masks above have waited for the device, so this is the time of all that was done.
        scalars["charts/SPS"] = batch_size / (time.time() - start)
        log(writer, scalars, global_step)
        progress.count(global_step, scores, envs.rooms, scalars["charts/intrinsic_reward"])
        stopped = bool(stop)
        last = stopped or iteration == num_iterations
        if last or iteration % args.checkpoint_interval == 0:
            progress.show("saving", final=last)
            counters = {"global_step": global_step, "rooms": sorted(envs.rooms), "scores": list(scores)}
            save_checkpoint(run_dir, args, learner, counters)
        if stopped and iteration < num_iterations:
            print(f"stopped at step {global_step:,}; go on with: python {sys.argv[0]} --resume {run_dir}")
            sys.exit(128 + stop[0])

    print(f"finished: {global_step:,} steps, {run_dir}/checkpoint.pt")
    print(f"curves: tensorboard --logdir {run_dir}, or python benchmark/curves.py {run_dir}")
    print(f"watch it play: python benchmark/enjoy.py {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped before training began; nothing was written", status=130)
    except OSError as error:
        fail(str(error), status=1)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error.__context__, OSError):  # torch.save on a full disk
            fail(str(error.__context__), status=1)
        # CUDA graphs, cuBLAS and CPUs run out of memory under names of their own.
        no_memory = re.search("out of memory|ALLOC_FAILED|allocate memory", f"{error} {error.__context__}")
        if no_memory or isinstance(error, MemoryError):
            fail("out of memory: lower --num-envs or --num-steps, or raise --num-minibatches", status=1)
        raise
