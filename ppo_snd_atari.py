"""PPO with self-supervised (siamese) network distillation (SND) for hard-exploration Atari games, in one file.

    python ppo_snd_atari.py --env-id MontezumaRevengeNoFrameskip-v4
    python ppo_snd_atari.py --env-id ALE/Venture-v5 --model A --num-envs 32 --seed 2
    python ppo_snd_atari.py --resume runs/NAME

As in RND, a predictor imitates a target network and its error is the intrinsic reward. Here the target learns too: a
contrastive loss pulls two augmented views of one state together and pushes different states apart, so that novelty
does not vanish as the predictor learns. What makes it work:

1. two value heads with their own discounts; the intrinsic stream flows on across the ends of episodes;
2. frames minus their running mean, divided by their running deviation, clamped to +-1, then augmented;
3. the distillation loss keeps a random share of the feature elements, which slows the predictor down;
4. advantages are 2 x extrinsic + 1 x intrinsic, not normalised, and the intrinsic reward is not divided by its std;
5. the row that resets an episode is not experience: no loss and no statistic sees it.

Papers: Pecháč et al. 2023 (SND, arXiv 2302.11563); Burda et al. 2018 (RND, arXiv 1810.12894).
"""

import contextlib
import ctypes
import difflib
import fcntl
import gc
import importlib.util
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import random
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import weakref
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Literal, NoReturn, TextIO, get_args

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models import FAST_BFLOAT16, ActorCritic, make_predictor, make_target

SCRIPT = Path(__file__).stem


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
    """compile the networks with torch.compile: half a minute at the start, then on a GPU a faster update"""
    bf16: bool = True
    """let fast hardware run the policy in bfloat16, and the novelty networks in TF32 or with bfloat16 gradients"""
    track: bool = False
    """also send the metrics to Weights and Biases"""
    wandb_project_name: str = "distillation-exploration"
    """project of Weights and Biases"""
    wandb_entity: str | None = None
    """team of Weights and Biases"""
    run_name: str | None = None
    """folder of the run below runs/; unset: game__script__seed__time"""
    resume: str | None = None
    """folder of a run to go on with, e.g. runs/NAME; its saved arguments apply, only --total-timesteps may be raised"""
    checkpoint_interval: int = 100
    """iterations between two checkpoints (one is also written at the start, at the end and when stopped)"""

    # the environment
    env_id: str = "MontezumaRevengeNoFrameskip-v4"
    """the game: MontezumaRevengeNoFrameskip-v4, ALE/MontezumaRevenge-v5 and MontezumaRevenge-v5 mean the same"""
    env_backend: Literal["envpool", "gymnasium"] = "envpool"
    """emulators in C++ threads (envpool), or one process each where envpool has no wheel (gymnasium)"""
    total_timesteps: int = 128_000_000
    """agent steps of the whole run, all environments together, 4 emulator frames each; whole iterations are played"""
    num_envs: int = 128
    """games played side by side"""
    repeat_action_probability: float = 0.25
    """sticky actions: the chance, at each emulator frame, that the last action is repeated; in [0, 1]"""
    episodic_life: bool = False
    """let the loss of a life end the learner's episode (the game and its score go on)"""

    # PPO
    model: Literal["A", "B", "C", "D"] = "C"
    """architecture of policy and value, see models.py"""
    learning_rate: float = 1e-4
    """learning rate of every Adam optimiser, constant"""
    num_steps: int = 128
    """steps of each environment between two updates"""
    gamma: float = 0.998
    """discount of the game's reward; in [0, 1]"""
    int_gamma: float = 0.99
    """discount of the intrinsic reward; in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; in [0, 1]"""
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
    """orthogonal gain of the actor's hidden layer; with 1.414 most of its units outlive the first update (Breakout)"""
    critic_hidden_gain: float = 0.1
    """orthogonal gain of the critic's hidden layer; 1.414 in the variants b1, b3 and c1"""

    # novelty
    norm_obs: Literal["none", "mean", "mean-std"] = "mean-std"
    """normalisation of the novelty networks' frame: as is, minus the mean, or also divided by std and clamped to +-1"""
    norm_init_steps: int = 256
    """random steps of each environment that start the frame statistics before training"""
    norm_int_reward: bool = False
    """divide the intrinsic reward by the running std of its discounted sum"""
    int_reward_scale: float = 0.5
    """the intrinsic reward is this times the mean squared error of the 512 features, clipped to [0, 1]"""
    int_episodic: bool = False
    """cut the intrinsic return at the end of an episode"""
    update_proportion: float | None = None
    """share of the distillation loss's elements that is kept, in (0, 1]; unset: min(1, 32 / num_envs)"""


def say(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print and flush; where the terminal is gone or the disk is full, train on in silence."""
    try:
        print(text, file=stream, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on standard error."""
    say(f"{SCRIPT}: {message}", sys.stderr)
    raise SystemExit(status)


def flag(name: str) -> str:
    """--num-envs for num_envs."""
    return f"--{name.replace('_', '-')}"


# Smallest and largest values of the numbers; a least value of TINY means larger than 0. A rollout of 2 steps always
# has rows that are not reset rows.
TINY, HUGE = sys.float_info.min, sys.float_info.max
BOUNDS = {"seed": (0, 2**31 - 1), "num_steps": (2, HUGE), "gae_lambda": (0, 1), "gamma": (0, 1), "int_gamma": (0, 1)}
BOUNDS |= {"repeat_action_probability": (0, 1), "update_proportion": (TINY, 1)}
BOUNDS |= dict.fromkeys(["learning_rate", "clip_coef", "max_grad_norm"], (TINY, HUGE))
BOUNDS |= dict.fromkeys(["num_envs", "num_minibatches", "update_epochs", "checkpoint_interval"], (1, HUGE))
BOUNDS |= dict.fromkeys(["ent_coef", "vf_coef", "ext_coef", "int_coef"], (0, HUGE))
BOUNDS |= dict.fromkeys(["actor_hidden_gain", "critic_hidden_gain", "norm_init_steps", "int_reward_scale"], (0, HUGE))


def check_args(args: Args) -> None:
    """Refuse numbers that cannot be trained with, before anything is built; exit status 2."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            above = "larger than 0" if least == TINY else f"at least {least}"
            below = f" and at most {most}" if most < HUGE else " and finite" * (not math.isfinite(value))
            fail(f"{flag(name)} {value}: must be {above}{below}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: must divide --num-envs x --num-steps = {batch_size}")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps}: must be at least --num-envs x --num-steps = {batch_size}")
    if args.run_name is not None and not os.path.normpath(Path("runs", args.run_name)).startswith("runs/"):
        fail(f"--run-name {args.run_name!r}: must be a folder below runs/")


def check_installed(args: Args) -> None:
    """Refuse a game, a backend or a tracker that this machine does not have; exit status 2."""
    game_of(args)
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs Weights and Biases: pip install wandb")


# ---- Environment -----------------------------------------------------------------------------------------------------

BACKEND_PACKAGES = {"envpool": ("envpool",), "gymnasium": ("ale_py", "cv2")}
BACKEND_INSTALL = {"envpool": "envpool==1.2.5", "gymnasium": "gymnasium ale-py opencv-python"}


def game_of(args: Args) -> str:
    """The game's name in EnvPool's spelling (MontezumaRevenge); exit status 2 if there is no such game or backend."""
    if not all(importlib.util.find_spec(package) for package in BACKEND_PACKAGES[args.env_backend]):
        other = "gymnasium" if args.env_backend == "envpool" else "envpool"
        fail(
            f"--env-backend {args.env_backend} is not installed: pip install {BACKEND_INSTALL[args.env_backend]} "
            f"(or use --env-backend {other})"
        )
    games = list(rom_names(args.env_backend))
    match = re.fullmatch(r"(\w+?)NoFrameskip-v4|(?:ALE/)?(\w+)-v5", args.env_id)
    name = match and (match[1] or match[2])
    if name in games:
        return name
    near = difflib.get_close_matches(name or re.sub(r"^ALE/|-v\d$", "", args.env_id), games, n=3)
    near = [f"{game}NoFrameskip-v4" for game in near or ["MontezumaRevenge"]]
    fail(f"--env-id {args.env_id}: no Atari game of that name; did you mean {' or '.join(near)}?")


def rom_names(backend: str) -> dict[str, str]:
    """{game: rom} of a backend, for instance {"MontezumaRevenge": "montezuma_revenge"}."""
    if backend == "envpool":
        from envpool.atari.registration import atari_game_list as roms
    else:
        from ale_py.roms import get_all_rom_ids

        roms = get_all_rom_ids()
    return {"".join(word.capitalize() for word in rom.split("_")): rom for rom in roms}


MAX_EPISODE_STEPS = 4500  # 18,000 emulator frames


class AtariGame(gymnasium.Env):
    """One game of ale-py under EnvPool's protocol, for the gymnasium backend.

    gymnasium's own preprocessing has no FIRE at the start and restarts the game after a lost life, so it is not used.
    Observation (4, 96, 96) uint8: grayscale, area resize, frame skip 4 with the maximum of the last two frames, the
    newest frame last; after a reset all four are the first frame. `info` has EnvPool's `ram` (128,) uint8, `reward`
    (the true score) and `terminated` (the game is over, not only a life).
    """

    def __init__(self, rom: str, seed: int, repeat_action_probability: float, episodic_life: bool):
        import ale_py
        import cv2

        if multiprocessing.parent_process():  # a worker; the training process decides when it ends
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not without the training process
        cv2.setNumThreads(1)
        self.resize = partial(cv2.resize, dsize=(96, 96), interpolation=cv2.INTER_AREA)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setInt("random_seed", seed)
        self.ale.setFloat("repeat_action_probability", repeat_action_probability)
        self.ale.loadROM(ale_py.roms.get_rom_path(rom))
        self.actions = self.ale.getMinimalActionSet()
        self.has_fire = ale_py.Action.FIRE in self.actions
        self.episodic_life, self.rng, self.elapsed_steps = episodic_life, np.random.default_rng(seed), MAX_EPISODE_STEPS
        self.screens = np.zeros((2, *self.ale.getScreenDims()), np.uint8)
        self.obs = np.zeros((4, 96, 96), np.uint8)
        self.observation_space = gymnasium.spaces.Box(0, 255, self.obs.shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Up to 30 no-ops, then FIRE if the game has it; after a lost life with episodic_life the game goes on."""
        new_game = self.ale.game_over() or self.elapsed_steps >= MAX_EPISODE_STEPS or not self.episodic_life
        if new_game:
            self.ale.reset_game()
            self.elapsed_steps = 0
        for _ in range(self.rng.integers(30) + 1 - self.has_fire):
            self.ale.act(0)
            if self.ale.game_over():
                self.ale.reset_game()
                new_game = True
        if self.has_fire:
            self.ale.act(1)
        self.lives = self.ale.lives()
        self.ale.getScreenGrayscale(self.screens[0])
        self.push_frame(self.screens[0], whole_stack=new_game)
        return self.obs.copy(), {"ram": self.ale.getRAM(), "reward": 0.0, "terminated": False}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Four emulator frames of one action."""
        reward = 0.0
        for frame in range(4):
            reward += self.ale.act(self.actions[action])
            if frame >= 2:
                self.ale.getScreenGrayscale(self.screens[frame - 2])
            if self.ale.game_over():  # the last frame is then, as in EnvPool, the newest that was taken
                break
        if frame == 3:
            np.maximum(*self.screens, out=self.screens[0])
        self.push_frame(self.screens[0])
        self.elapsed_steps += 1
        game_over, life_lost = self.ale.game_over(), 0 < self.ale.lives() < self.lives
        self.lives = self.ale.lives()
        truncated = not game_over and self.elapsed_steps >= MAX_EPISODE_STEPS
        life_over = self.episodic_life and life_lost and not truncated
        info = {"ram": self.ale.getRAM(), "reward": reward, "terminated": game_over}
        return self.obs.copy(), reward, game_over or life_over, truncated, info

    def push_frame(self, screen: np.ndarray, whole_stack: bool = False) -> None:
        """Append a (height, width) grayscale screen to the stack, or fill the stack with it."""
        self.obs[:-1] = self.obs[1:]
        self.obs[slice(None) if whole_stack else -1] = self.resize(screen)


class AtariEnvs:
    """N games side by side behind either backend, with the book-keeping that a run needs.

    An episode's end is followed by a *reset row*: the step after it ignores its action and returns the first
    observation of the next episode. So where `next_done` is True, `next_obs` is the true final observation.

    The games may form groups, so that some play while the network looks at the others.

    Attributes:
        groups: the games of each group, as slices of the N.
        frames: of each group, (size of the group, 4, 96, 96) uint8, what the next action is chosen on.
        next_done: (N,) bool, True where the next row is a reset row.
        num_actions: actions of the game.
        rooms: ids of the distinct rooms seen; None where the game's rooms are unknown.
        returns, lengths: true scores and agent steps of the games finished since they were last taken.
    """

    def __init__(self, args: Args, seed: int, num_groups: int = 1):
        self.game, n = game_of(args), args.num_envs
        num_groups = min(n, num_groups)
        edges = [n * i // num_groups for i in range(num_groups + 1)]
        self.groups = [slice(*edge) for edge in itertools.pairwise(edges)]
        self.envs = [self.make(args, seed, group) for group in self.groups]
        self.num_actions = int(self.envs[0].single_action_space.n)
        try:
            self.frames, infos = zip(*(envs.reset() for envs in self.envs), strict=True)
        except (EOFError, ConnectionError):  # a worker died
            self.close()
            raise
        self.frames, self.next_done = list(self.frames), np.zeros(n, bool)
        self.ram = np.concatenate([info["ram"] for info in infos])
        self.scores, self.steps = np.zeros(n), np.zeros(n, int)
        self.returns, self.lengths = [], []
        self.rooms = set() if self.game in ROOM_GAMES else None
        self.count_rooms(self.ram, self.ram, np.ones(n, bool))

    @property
    def next_obs(self) -> np.ndarray:
        """The frames of all games, (N, 4, 96, 96) uint8."""
        return np.concatenate(self.frames)

    def make(self, args: Args, seed: int, group: slice) -> gymnasium.vector.VectorEnv:
        """The games of a group behind the chosen backend; game i has the seed `seed + i` however they are grouped."""
        if args.env_backend == "envpool":
            import envpool

            return envpool.make(
                f"{self.game}-v5",
                env_type="gymnasium",
                num_envs=group.stop - group.start,
                seed=seed + group.start,
                img_height=96,
                img_width=96,
                max_episode_steps=MAX_EPISODE_STEPS,
                repeat_action_probability=args.repeat_action_probability,
                episodic_life=args.episodic_life,
            )
        rom, rules = rom_names("gymnasium")[self.game], (args.repeat_action_probability, args.episodic_life)
        games = [partial(AtariGame, rom, seed + i, *rules) for i in range(group.start, group.stop)]
        gc.freeze()  # a worker may not collect, and so destroy, objects that belong to this process's threads
        # fork: the workers share this process's memory, a spawned one would import torch again.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # until a worker has its own
        try:
            envs = gymnasium.vector.AsyncVectorEnv(games, context="fork")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            gc.unfreeze()
        envs.send, envs.recv = envs.step_async, envs.step_wait  # EnvPool's names
        return envs

    def step_async(self, group: int, actions: np.ndarray) -> None:
        """Start a step of a group's games with actions (size of the group,) int32."""
        self.envs[group].send(actions)

    def step_wait(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """End a group's step; returns its unclipped rewards float32, and `terminated` and `done` bool."""
        rows = self.groups[group]
        self.frames[group], _, terminated, truncated, info = self.envs[group].recv()
        game_over = info["terminated"].astype(bool)
        terminated |= game_over  # in its last permitted step, EnvPool calls a game that is over only truncated
        done = terminated | truncated
        self.scores[rows] += info["reward"]
        self.steps[rows] += ~self.next_done[rows]  # a reset row is no step
        for i in rows.start + np.flatnonzero(game_over | truncated):
            self.returns.append(float(self.scores[i]))
            self.lengths.append(int(self.steps[i]))
            self.scores[i] = self.steps[i] = 0
        self.count_rooms(info["ram"], self.ram[rows], self.next_done[rows])
        self.next_done[rows], self.ram[rows] = done, info["ram"]
        return info["reward"].astype(np.float32), terminated, done

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step every game; actions, rewards, `terminated` and `done` are (N,)."""
        for group, rows in enumerate(self.groups):
            self.step_async(group, actions[rows])
        results = [self.step_wait(group) for group in range(len(self.groups))]
        return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))

    def count_rooms(self, ram: np.ndarray, last_ram: np.ndarray, first: np.ndarray) -> None:
        """Add the rooms that the memories `ram` show, see rooms_of."""
        if self.rooms is not None:
            rooms = rooms_of(self.game, ram, last_ram, first)
            self.rooms.update(rooms[rooms >= 0].tolist())

    def close(self) -> None:
        """Stop the worker processes, if the backend has any, dead or alive."""
        for envs in self.envs:
            if isinstance(envs, gymnasium.vector.AsyncVectorEnv):
                for process in envs.processes:
                    process.kill()
                    process.join()
                envs.closed = True


ROOM_BYTE = {"Pitfall": 1, "PrivateEye": 92, "Venture": 90}  # where the game keeps the number of the room
ROOM_GAMES = {"MontezumaRevenge", "Gravitar", "Solaris", *ROOM_BYTE}


def rooms_of(game: str, ram: np.ndarray, last_ram: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Room ids (N,) int of the games of which `ram` (N, 128) uint8 is the memory; -1 where it tells none.

    `last_ram` is the memory one step earlier; `first` (N,) bool marks the first observation of an episode.
    """
    ram = ram.astype(int)
    if game == "MontezumaRevenge":
        return ram[:, 3] + 24 * ram[:, 57]  # room, level
    if game in ROOM_BYTE:
        return ram[:, ROOM_BYTE[game]]
    if game == "Gravitar":  # modes: 2 overview, 3 planet, 4 reactor, 5 saucer fight; any other shows no place
        mode, place = ram[:, 1], np.where(ram[:, 1] == 3, ram[:, 2] & 0x0F, ram[:, 2] & 0x0C)
        return np.where((mode >= 2) & (mode <= 5), 16 * mode + place, -1)
    sector = 64 * ram[:, 77] + ram[:, 8]  # Solaris: while the scanner is open this follows the cursor,
    return np.where(first | ((last_ram[:, 13] == 16) & (ram[:, 13] != 16)), sector, -1)  # so read it as a warp ends


# ---- Statistics ------------------------------------------------------------------------------------------------------


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors with equally many rows, for what needs no gradient: small on a CPU, which saves memory."""
    rows = 256 if tensors[0].device.type == "cpu" else 2048
    return zip(*(x.split(rows) for x in tensors), strict=True)


def take(obs: Tensor, inds: Tensor) -> Tensor:
    """obs[inds] of obs (rows, ..., 96, 96) uint8 and inds (n,) int64, copied eight pixels at a time.

    A row of another type must be a multiple of eight bytes long.
    """
    return obs.view(torch.int64).index_select(0, inds).view(obs.dtype)


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows ever given to `update`, by Chan's parallel formula, as buffers of a checkpoint.

    The batches stay in float32; only the statistics, one number per element, are float64.
    """

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add the rows of x, (rows, *shape) float32."""
        mean = x.mean(dim=0)
        var = (x - mean).square_().mean(dim=0)  # on a CPU a fifth of torch.var_mean's time
        mean, var = mean.double(), var.double()
        total = self.count + len(x)
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * len(x) + delta.square() * self.count * len(x) / total) / total)
        self.mean += delta * len(x) / total
        self.count.copy_(total)


class DiscountedReturns(nn.Module):
    """Running variance of the discounted sum of a reward stream, the scale of `--norm-int-reward` (Burda et al. 2.4).

    The sum runs over time, one per environment, and stands still on reset rows.
    """

    def __init__(self, num_envs: int):
        super().__init__()
        self.register_buffer("returns", torch.zeros(num_envs))
        self.stats = RunningMeanStd()

    def update(self, rewards: Tensor, valid: Tensor, valid_inds: Tensor, gamma: float) -> None:
        """Add the rewards (T, N) of a rollout; `valid` (T, N) bool and its indices `valid_inds` skip reset rows."""
        returns = torch.empty_like(rewards)
        for t in range(len(rewards)):
            self.returns.copy_(torch.where(valid[t], gamma * self.returns + rewards[t], self.returns))
            returns[t] = self.returns
        self.stats.update(returns.flatten()[valid_inds])


def init_obs_stats(obs_stats: RunningMeanStd, args: Args, seed: int) -> None:
    """Start the frame statistics, still on the CPU, with `norm_init_steps` random steps of each environment."""
    envs, rng = AtariEnvs(args, seed), np.random.default_rng(seed)
    try:
        for _ in range(args.norm_init_steps):
            frames = torch.from_numpy(envs.next_obs[~envs.next_done, -1:])  # not the input of a reset row
            if len(frames):
                obs_stats.update(frames / 256)
            envs.step(rng.integers(envs.num_actions, size=args.num_envs, dtype=np.int32))
    finally:
        envs.close()


def update_obs_stats(obs_stats: RunningMeanStd, obs: Tensor, valid_inds: Tensor) -> None:
    """Add the newest frames of the rows `valid_inds` of obs (rows, 4, 96, 96) uint8."""
    for (inds,) in in_chunks(valid_inds):
        obs_stats.update(take(obs[:, -1:], inds).float().div_(256))


# ---- Algorithm -------------------------------------------------------------------------------------------------------


class Learner:
    """Everything that learns or is learned from; every attribute has a state_dict and goes into the checkpoint."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.agent = ActorCritic(args.model, num_actions, 2, args.actor_hidden_gain, args.critic_hidden_gain)
        self.target = make_target(coarse_gradients=args.bf16)
        self.predictor = make_predictor(coarse_gradients=args.bf16)
        self.obs_stats = RunningMeanStd((1, 96, 96))
        self.int_returns = DiscountedReturns(args.num_envs)
        for module in vars(self).values():  # networks and statistics stand above this line, optimisers below
            module.to(device, memory_format=torch.channels_last)
            if args.compile:
                torch._dynamo.config.recompile_limit = 32  # the novelty networks share one forward, and so one count
                module.compile(dynamic=False)  # the few batch shapes never change
        # fused: one kernel for all parameters instead of several for each. capturable: `graphed` may record it.
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=device.type == "cuda")
        self.optimizer = adam(self.agent.parameters())
        self.predictor_optimizer = adam(self.predictor.parameters())
        self.target_optimizer = adam(self.target.parameters())


@dataclass
class Rollout:
    """T = num_steps rows of N = num_envs environments; row t's action was chosen on obs[t] and led to obs[t + 1]."""

    obs: Tensor  # (T + 1, N, 4, 96, 96) uint8, overwritten by the next rollout, which begins with row T
    actions: Tensor  # (T, N) int64
    logprobs: Tensor  # (T, N) float32
    values: Tensor  # (T + 1, N, value heads) float32
    ext_rewards: Tensor  # (T, N) float32, the sign of the game's reward
    terminations: Tensor  # (T, N) bool, the episode ended for good: nothing to bootstrap from
    dones: Tensor  # (T, N) bool, terminated or truncated
    valid: Tensor  # (T, N) bool, False on reset rows
    valid_inds: Tensor  # (number of valid rows,) int64, into the T x N rows


def autocast(args: Args, device: torch.device) -> torch.autocast:
    """bfloat16 for the policy, where the hardware multiplies it fast; the novelty networks never run under this.

    Measured with benchmark/precision.py on an H100 (model C): before the first update the policy's probability ratios
    are within 0.12 % of the clip range of 1, those of a policy sharpened to half the largest entropy within 2 %. At an
    RND reward of 1e-3, though, bfloat16 would be wrong by half of it (H100 63 %, CPU 40 %), TF32 by 0.6 %, so the
    novelty networks run in TF32 on a GPU, in float32 on a CPU.
    """
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else FAST_BFLOAT16
    # A CUDA graph must cast the weights each time, for it would not notice that they changed.
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and fast, cache_enabled=device.type == "cpu")


def novelty_input(obs: Tensor, obs_stats: RunningMeanStd, norm_obs: str) -> Tensor:
    """The newest frame of obs (batch, 4, 96, 96) uint8, normalised: (batch, 1, 96, 96) float32."""
    x = obs[:, -1:].float().div_(256)
    if norm_obs != "none":
        x.sub_(obs_stats.mean.float())
    if norm_obs == "mean-std":
        # A pixel that never changed has std 0. Our choice: divide by no less than one grey level.
        x.div_(obs_stats.var.sqrt().float().clamp(min=1 / 256)).clamp_(-1, 1)
    return x


def augment(x: Tensor) -> Tensor:
    """Random views of x (batch, frames, 96, 96) float32, each sample on its own; the same shape.

    In this order: 2x2 mean blocks with probability 1/2, 4x4 with 1/4, a tenth of the pixels to zero with 1/8, and
    always uniform noise of +-0.2.
    """

    def chance(p: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < p

    x = torch.where(chance(1 / 2), F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), x)
    x = torch.where(chance(1 / 4), F.interpolate(F.avg_pool2d(x, 4), scale_factor=4), x)
    x = torch.where(chance(1 / 8) & (torch.rand_like(x) < 0.1), 0.0, x)
    return x + 0.4 * torch.rand_like(x) - 0.2


def draw_pairs(valid_inds: Tensor, num_minibatches: int, num_pairs: int) -> tuple[Tensor, Tensor]:
    """For each minibatch, the rows of the states A and B of `num_pairs` pairs, A first, and the pairs' labels.

    Label 0: B is A. Label 1, with probability 1/2: B is another state, drawn uniformly. Returns (num_minibatches, 2 *
    num_pairs) int64 and (num_minibatches, num_pairs) float32.
    """
    n, shape, device = len(valid_inds), (num_minibatches, num_pairs), valid_inds.device
    a = torch.randint(n, shape, device=device)
    labels = torch.randint(2, shape, device=device)
    other = (a + 1 + torch.randint(max(n - 1, 1), shape, device=device)) % n
    return valid_inds[torch.cat([a, torch.where(labels == 1, other, a)], dim=1)], labels.float()


def contrastive_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Mean of (label - d)^2, where d is the mean squared difference of a pair's features (SND's target, MSE variant).

    features (2 * pairs, dims): the states A, then the states B; labels (pairs,): 0 same state, 1 different.
    """
    a, b = features.chunk(2)
    return (labels - (a - b).square().mean(dim=1)).square().mean()


def novelty(target_features: Tensor, predictor_features: Tensor, scale: float) -> Tensor:
    """Intrinsic reward (batch,) of features (batch, 512): scale * mean squared error, clipped to [0, 1]."""
    return (scale * (target_features - predictor_features).square().mean(dim=1)).clamp(0, 1)


@torch.no_grad()
def intrinsic_rewards(learner: Learner, rollout: Rollout, args: Args) -> Tensor:
    """Novelty (T, N) of every row's *next* observation, 0 on reset rows."""
    next_obs = rollout.obs[1:].flatten(0, 1)
    rewards = torch.empty(len(next_obs), device=next_obs.device)
    for chunk, chunk_rewards in in_chunks(next_obs, rewards):
        x = novelty_input(chunk, learner.obs_stats, args.norm_obs)
        chunk_rewards.copy_(novelty(learner.target(x), learner.predictor(x), args.int_reward_scale))
    rewards = rewards.view_as(rollout.valid) * rollout.valid
    if args.norm_int_reward:
        learner.int_returns.update(rewards, rollout.valid, rollout.valid_inds, args.int_gamma)
        rewards = rewards / learner.int_returns.stats.var.sqrt().float().clamp(min=1e-8)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, terminations: Tensor, dones: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) with true final observations.

    rewards, terminations, dones are (T, N), values (T + 1, N); returns the advantages (T, N). `terminations` cut the
    bootstrap from the next value, `dones` the flow of later advantages. Because the row after an end holds the final
    observation, its value is the right bootstrap of a truncated episode. A non-episodic stream passes no ends at all
    and so flows through reset rows, whose reward is 0.
    """
    advantages = rewards + gamma * values[1:] * ~terminations - values[:-1]  # the deltas: the last row is complete
    decay = gamma * gae_lambda * ~dones
    for t in reversed(range(len(rewards) - 1)):
        advantages[t].addcmul_(decay[t], advantages[t + 1])  # delta + decay * the next advantage
    return advantages


def estimate_advantages(rollout: Rollout, int_rewards: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """The combined advantages (T, N) and each value head's returns (T, N, heads)."""
    ends = (rollout.terminations, rollout.dones)
    int_ends = ends if args.int_episodic else (torch.zeros_like(rollout.dones),) * 2
    values = rollout.values.unbind(dim=-1)
    streams = [gae(rollout.ext_rewards, values[0], *ends, args.gamma, args.gae_lambda)]
    streams += [gae(int_rewards, values[1], *int_ends, args.int_gamma, args.gae_lambda)]
    advantages = args.ext_coef * streams[0] + args.int_coef * streams[1]
    return advantages, torch.stack(streams, dim=-1) + rollout.values[:-1]


def ppo_loss(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    valid: Tensor,
    trained_values: Tensor,
    args: Args,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, the value heads' squared error and the entropy bonus, over the valid rows.

    logits (batch, actions); values and returns (batch, heads); the rest (batch,). `trained_values` (heads,) is 1 for
    the heads that learn. Returns the loss and, detached, (policy_loss, value_loss, entropy, approx_kl, clipfrac).
    """
    weights = valid / valid.sum().clamp(min=1)  # a reset row weighs 0; the shape of a minibatch never changes
    all_logprobs = logits.log_softmax(dim=1)
    logratio = all_logprobs.gather(1, actions[:, None])[:, 0] - old_logprobs
    ratio = logratio.exp()
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    policy_loss = (policy_loss * weights).sum()
    value_loss = (((values - returns).square() * trained_values).sum(dim=1) * weights).sum()
    entropy = (-(all_logprobs.exp() * all_logprobs).sum(dim=1) * weights).sum()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        approx_kl = ((ratio - 1 - logratio) * weights).sum()
        clipfrac = (((ratio - 1).abs() > args.clip_coef) * weights).sum()
        return loss, torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac])


def distillation_loss(
    predictor_features: Tensor, target_features: Tensor, valid: Tensor, update_proportion: float
) -> Tensor:
    """Mean squared error over a random share of the elements of features (batch, 512); reset rows are left out."""
    keep = valid[:, None].expand_as(target_features)
    if update_proportion < 1:
        keep = keep & (torch.rand_like(target_features) < update_proportion)
    return ((predictor_features - target_features).square() * keep).sum() / keep.sum().clamp(min=1)


def explained_variance(rollout: Rollout, advantages: Tensor, returns: Tensor, args: Args) -> Tensor:
    """Share of the variance of the coefficient-weighted returns that the values explain, over the valid rows."""
    coefs = torch.tensor([args.ext_coef, args.int_coef], device=returns.device)
    combined = (returns * coefs).sum(dim=-1).flatten()[rollout.valid_inds]
    return 1 - advantages.flatten()[rollout.valid_inds].var(correction=0) / combined.var(correction=0).clamp(min=1e-8)


# ---- Rollout and update ----------------------------------------------------------------------------------------------


POLICY_LOSSES = ["policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"]
NOVELTY_LOSSES = ["distillation", "contrastive"]
NUM_PAIRS = 64  # pairs of states in each step of the contrastive loss


def graphed(function: Callable) -> Callable:
    """On a GPU, record the kernels of `function(learner, args, *tensors)` and replay them: one launch for thousands.

    Of every combination of arguments and shapes the first call runs the function, which lets the libraries set
    themselves up, the second records it, and all later ones replay the recording, without Python. Therefore:

    - what changes from call to call is one of `tensors`, or is changed in place;
    - what is returned lasts until the next call, for a recording works in fixed memory;
    - nothing inside waits for the device;
    - of recordings that run at the same time only one draws random numbers.

    To debug, take the decorator away. On a CPU this is the function itself.
    """
    recordings = weakref.WeakKeyDictionary()  # learner -> {arguments and shapes: None after one call, then a recording}

    @wraps(function)
    def replay(learner: Learner, args: Args, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        if tensors[0].device.type == "cpu":
            return function(learner, args, *tensors)
        known = recordings.setdefault(learner, {})
        key = (*vars(args).values(), *((x.shape, x.dtype) for x in tensors))
        if key not in known:
            known[key] = None
            return function(learner, args, *tensors)
        if known[key] is None:  # recording runs no kernel, so this call goes on to the replay
            graph, inputs = torch.cuda.CUDAGraph(), [x.clone() for x in tensors]
            # A new stream, for cuBLAS has one workspace a stream, which recordings that replay side by side must not
            # share; of the caller's priority, which the kernels keep.
            stream = torch.cuda.Stream(priority=torch.cuda.current_stream().priority)
            with torch.cuda.graph(graph, stream=stream):
                known[key] = graph, inputs, function(learner, args, *inputs)
        graph, inputs, outputs = known[key]
        for memory, x in zip(inputs, tensors, strict=True):
            memory.copy_(x)
        graph.replay()
        return outputs

    return replay


@contextlib.contextmanager
def in_background(*tensors: Tensor) -> Iterator[None]:
    """On a GPU, run what is inside after all that is queued so far, but beside what is queued later.

    There are two queues of kernels: `main` makes a stream of its own, and the default one is left to this background.
    `tensors` are those from outside that are used inside: their memory is not reused before the background is done.
    Gradients are on and autocast is off here, for the caller may be `collect_rollout`, where it is the other way round.
    """
    device, stream = tensors[0].device, contextlib.nullcontext()
    if device.type == "cuda":
        background = torch.cuda.default_stream()
        background.wait_stream(torch.cuda.current_stream())
        for x in tensors:
            x.record_stream(background)
        stream = torch.cuda.stream(background)
    with stream, torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def finish(training: Iterator[None] | None, device: torch.device) -> None:
    """Train to the end, and let what is queued from here on begin after what is in the background."""
    for _ in training or ():
        pass
    if device.type == "cuda":
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())


@graphed
def act(learner: Learner, args: Args, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Actions (batch,) int64, their log-probabilities (batch,) and the values (batch, heads) of obs (batch, ...).

    `noise` (batch, actions) float32 comes from the exponential distribution.
    """
    with autocast(args, obs.device):
        logits, values = learner.agent(obs)
    # The Gumbel trick: unlike torch.distributions it never asks the device for a yes or no.
    actions = (logits - noise.log()).argmax(dim=1)
    return actions, logits.log_softmax(dim=1).gather(1, actions[:, None])[:, 0], values


@torch.no_grad()
def collect_rollout(
    envs: AtariEnvs, learner: Learner, obs: Tensor, args: Args, training: Iterator[None] | None = None
) -> Rollout:
    """Play `num_steps` steps of every environment; fills obs (T + 1, N, 4, 96, 96) uint8 and returns the rollout.

    One forward pass per step: the values come with the actions, and a last pass gives those to bootstrap from. Whenever
    games have begun to play, the novelty networks' `training` on the last rollout goes a minibatch on.
    """
    device, shape = obs.device, (args.num_steps, args.num_envs)
    # Its own generator, from Python's: how far `training` has drawn from torch's depends on when checkpoints are made.
    generator = torch.Generator(device).manual_seed(random.getrandbits(63))
    noise = torch.empty(args.num_steps + 1, args.num_envs, envs.num_actions, device=device)
    noise.exponential_(generator=generator)
    actions, logprobs = torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device)
    values = torch.empty(args.num_steps + 1, args.num_envs, learner.agent.values.out_features, device=device)
    rewards = np.empty(shape, np.float32)
    terminations, dones, valid = (np.empty(shape, bool) for _ in range(3))
    with autocast(args, device):  # around the whole loop, so that on a CPU the weights are cast once
        for t in range(args.num_steps + 1):
            for group, rows in enumerate(envs.groups):  # while the network looks at one, the others play
                if t > 0:
                    rewards[t - 1, rows], terminations[t - 1, rows], dones[t - 1, rows] = envs.step_wait(group)
                obs[t, rows] = torch.from_numpy(envs.frames[group])
                new_actions, new_logprobs, values[t, rows] = act(learner, args, obs[t, rows], noise[t, rows])
                if t < args.num_steps:
                    actions[t, rows], logprobs[t, rows] = new_actions, new_logprobs
                    valid[t, rows] = ~envs.next_done[rows]
                    next_actions = new_actions.to("cpu", torch.int32).numpy()
                    if device.type == "cpu":
                        end_idle_threads()
                    envs.step_async(group, next_actions)
                    if training is not None:
                        next(training, None)
    on_host = [np.sign(rewards), terminations, dones, valid, np.flatnonzero(valid)]
    return Rollout(obs, actions, logprobs, values, *(torch.from_numpy(array).to(device) for array in on_host))


def end_idle_threads() -> None:
    """End OpenMP's threads: they wait actively, on processors that the emulators need, and new ones start quickly."""
    openmp = ctypes.CDLL(None)
    if hasattr(openmp, "omp_pause_resource_all"):
        openmp.omp_pause_resource_all(1)  # omp_pause_soft


def shuffled_inds(args: Args, device: torch.device) -> Tensor:
    """The minibatches of all epochs, (update_epochs * num_minibatches, size) int64: in each epoch every row once."""
    epochs = [torch.randperm(args.num_steps * args.num_envs, device=device) for _ in range(args.update_epochs)]
    return torch.cat(epochs).view(args.update_epochs * args.num_minibatches, -1)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float | None = None) -> None:
    """One gradient step on a scalar loss, the gradient's norm clipped if `max_grad_norm` is given."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


@graphed
def train_policy(learner: Learner, args: Args, inds: Tensor, obs: Tensor, *batch: Tensor) -> Tensor:
    """Train the policy and the values on the minibatches inds (minibatches, size); returns the mean PPO losses (5,).

    obs (rows, 4, 96, 96) uint8; `batch` are ppo_loss's actions, old_logprobs, advantages, returns and valid, by row.
    """
    coefs = (args.ext_coef, args.int_coef)
    trained_values = torch.stack([torch.full((), float(coef > 0), device=obs.device) for coef in coefs])
    loss_function = torch.compile(ppo_loss, dynamic=False) if args.compile else ppo_loss
    losses = []
    for mb_inds in inds:
        with autocast(args, obs.device):
            logits, values = learner.agent(take(obs, mb_inds))
        loss, stats = loss_function(logits, values, *(x[mb_inds] for x in batch), trained_values, args)
        descend(learner.optimizer, loss, args.max_grad_norm)
        losses.append(stats)
    return torch.stack(losses).mean(dim=0)


@graphed
def novelty_step(
    learner: Learner, args: Args, pair_frames: Tensor, labels: Tensor, frames: Tensor, valid: Tensor
) -> Tensor:
    """Train the target and the predictor on one minibatch; returns the distillation and contrastive losses (2,).

    pair_frames (2 * NUM_PAIRS, 1, 96, 96) uint8 and labels (NUM_PAIRS,) for the target; frames (size, 1, 96, 96) uint8,
    the newest ones, and valid (size,) bool for the predictor.
    """
    pairs = novelty_input(pair_frames, learner.obs_stats, args.norm_obs)
    contrastive = contrastive_loss(learner.target(augment(pairs)), labels)
    descend(learner.target_optimizer, contrastive)

    update_proportion = args.update_proportion or min(1, 32 / args.num_envs)
    x = novelty_input(frames, learner.obs_stats, args.norm_obs)
    with torch.no_grad():
        target_features = learner.target(x)
    distillation = distillation_loss(learner.predictor(x), target_features, valid, update_proportion)
    descend(learner.predictor_optimizer, distillation)
    return torch.stack([distillation, contrastive]).detach()


def train_novelty(
    learner: Learner, args: Args, losses: Tensor, inds: Tensor, obs: Tensor, valid: Tensor, valid_inds: Tensor
) -> Iterator[None]:
    """Train the novelty networks, at each `next` on one of the minibatches inds (minibatches, size).

    On a GPU `collect_rollout` calls `next` whenever games have begun to play, and `finish` does the rest. (All at once
    would fill the GPU's launch queue, and the host, which keeps the games going, would wait.) Adds the mean losses to
    `losses` (len(NOVELTY_LOSSES),), zeros at the start.

    obs (rows, 1, 96, 96) uint8, the newest frames, and valid (rows,) bool by row; valid_inds (valid rows,) int64.
    """
    pair_inds, labels = draw_pairs(valid_inds, len(inds), NUM_PAIRS)
    for mb_inds, mb_pair_inds, mb_labels in zip(inds, pair_inds, labels, strict=True):
        with in_background(losses, inds, pair_inds, labels, obs, valid):
            minibatch = take(obs, mb_pair_inds), mb_labels, take(obs, mb_inds), valid[mb_inds]
            losses += novelty_step(learner, args, *minibatch).view_as(losses) / len(inds)
        yield


def update(
    learner: Learner, rollout: Rollout, advantages: Tensor, returns: Tensor, args: Args
) -> tuple[dict[str, Tensor], Iterator[None]]:
    """Train on a rollout; advantages (T, N), returns (T, N, heads).

    Returns the mean losses, numbers on the device, and the novelty networks' training: done on a CPU; on a GPU yet to
    be done, and its losses 0 until then. Those networks share nothing with the policy, which can already play the next
    rollout. Nothing here waits for the device.
    """
    device = rollout.obs.device
    # The T rows that were played; row T of obs and values is there to bootstrap from.
    batch = [rollout.obs[:-1], rollout.actions, rollout.logprobs, advantages, returns, rollout.valid]
    batch = [x.flatten(0, 1) for x in batch]
    # clone: these losses are logged only after the next update, which overwrites what a recording has returned.
    policy_losses = train_policy(learner, args, shuffled_inds(args, device), *batch).clone()

    novelty_losses = torch.zeros(len(NOVELTY_LOSSES), device=device)
    obs, valid = rollout.obs[:-1, :, -1:].flatten(0, 1), rollout.valid.flatten()
    obs = obs if device.type == "cpu" else obs.clone()  # which the next rollout overwrites
    minibatches = shuffled_inds(args, device), obs, valid, rollout.valid_inds
    training = train_novelty(learner, args, novelty_losses, *minibatches)
    if device.type == "cpu":
        finish(training, device)
    return dict(zip(POLICY_LOSSES + NOVELTY_LOSSES, [*policy_losses, *novelty_losses], strict=True)), training


# ---- Book-keeping ----------------------------------------------------------------------------------------------------

CHECKPOINT_VERSION = 2


def warn(message: str) -> None:
    """One line on standard error, below the live line of a terminal; training goes on."""
    say(("\n" if sys.stdout.isatty() else "") + f"{SCRIPT}: warning: {message}", sys.stderr)


class Log:
    """TensorBoard events of a run; a full disk costs log lines, not the run.

    A step is written one iteration late, or at `flush`, for its numbers may still be on their way from the GPU.
    """

    def __init__(self, run_dir: Path, args: Args, step: int):
        self.run_dir, self.pending = run_dir, ({}, step)
        # The writer's thread need not print the error that `write` reports.
        threading.excepthook = lambda error: issubclass(error.exc_type, OSError) or threading.__excepthook__(error)
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=re.sub(r"\W", "-", args.run_name),
                name=args.run_name,
                resume="allow",
                config=asdict(args),
                sync_tensorboard=True,
                save_code=True,
            )
        self.writer = SummaryWriter(str(run_dir), purge_step=step + 1)  # hides what older files logged from there on
        if step == 0:
            rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.writer.flush()

    def write(self, scalars: dict[str, float | Tensor], step: int) -> None:
        """Log {tag: value} at an agent step, when the next is logged or at `flush`; until then no tensor may change."""
        self.flush()
        self.pending = scalars, step

    def flush(self, learner: Learner | None = None) -> None:
        """Put the last step on the disk; exit status 1 if a number of it, or a weight of `learner`, is not finite."""
        scalars, step = {tag: float(value) for tag, value in self.pending[0].items()}, self.pending[1]
        self.pending = {}, step
        parts = vars(learner).items() if learner else ()
        networks = {f"weights/{name}": list(part.parameters()) for name, part in parts if isinstance(part, nn.Module)}
        norms = {name: nn.utils.get_total_norm(parameters).item() for name, parameters in networks.items()}
        for name, value in (scalars | norms).items():
            if not math.isfinite(value):
                fail(f"step {step}: {name} is {value}; the last good checkpoint is kept in {self.run_dir}", status=1)
        before = set(self.run_dir.glob("events.out.tfevents.*"))
        try:
            self.writer = self.writer or SummaryWriter(str(self.run_dir), purge_step=step)
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
            self.writer.flush()
        except OSError as error:
            warn(f"step {step} was not logged: {error}")
            self.writer = None  # the next step begins a new file, and takes it back if that cannot be written either
            for path in set(self.run_dir.glob("events.out.tfevents.*")) - before:
                path.unlink()


class Progress:
    """A line that is rewritten in a terminal, and printed every half minute elsewhere."""

    def __init__(self, args: Args, step: int):
        self.total, self.first, self.start, self.last = args.total_timesteps, step, time.time(), 0.0

    def show(self, step: int, scores: deque, rooms: set | None, int_reward: float, final: bool) -> None:
        """Steps done, steps per second, time left, mean return of the last 100 games, rooms, intrinsic reward."""
        terminal, now = sys.stdout.isatty(), time.time()
        if not terminal and not final and now - self.last < 30:
            return
        self.last = now
        rate = (step - self.first) / (now - self.start)
        left = int((self.total - step) / rate)
        line = f"{step:,} / {self.total:,} steps | {rate:,.0f} steps/s | {left // 3600}:{left // 60 % 60:02} h left"
        line += f" | return {np.mean(scores):,.1f}" if scores else " | return -"
        line += f" | rooms {len(rooms)}" if rooms is not None else ""
        line += f" | r_int {int_reward:.4f}"
        say(f"\r{line}\x1b[K" if terminal else line, sys.stdout, end="\n" if final or not terminal else "")


def open_run(run_dir: Path, new: bool) -> None:
    """Make a new run's folder, or take an old one's, and hold it until this process ends, however it ends.

    Exit status 2 if the folder is taken or cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_WRONLY | os.O_CREAT)  # never closed: that would give the lock back
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, forked workers do not inherit it
    except (BlockingIOError, PermissionError):
        fail(f"{run_dir} is in use by another process, or you may not write there")
    except OSError as error:
        fail(f"cannot write to {run_dir}: {error.strerror}")
    if new and (run_dir / "checkpoint.pt").exists():
        fail(f"{run_dir} holds a run already: go on with --resume {run_dir}, or choose another --run-name")


def discard_run(run_dir: Path) -> None:
    """Take back the files of a run that could not start, and its folder if nothing else is in it."""
    for path in [run_dir / "checkpoint.pt", run_dir / "lock", *run_dir.glob(f"events.out.tfevents.*.{os.getpid()}.*")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run_dir.rmdir()


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error) or repr(error)
    return textwrap.shorten(text.split("WeightsUnpickler error: ")[-1], 200)  # torch puts advice before the cause


def save_checkpoint(run_dir: Path, args: Args, learner: Learner, counters: dict) -> None:
    """Write `checkpoint.pt` so that a kill at any instant leaves the old one or the new one.

    OSError if it cannot be written, or not be read back.
    """
    state = {
        "version": CHECKPOINT_VERSION,
        "script": SCRIPT,
        "args": asdict(args) | {"resume": None},
        "learner": {name: part.state_dict() for name, part in vars(learner).items()},
        "counters": counters,
        "random": {
            "python": random.getstate(),
            "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        },
    }
    path, temporary = run_dir / "checkpoint.pt", run_dir / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        # Not every state that a copy of this script may have added can be read back. This reads all but the tensors.
        torch.load(temporary, map_location="meta", weights_only=True)
        os.replace(temporary, path)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # a failed write is torch.save's RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(reason(error.__context__ if isinstance(error.__context__, OSError) else error)) from error
    folder = os.open(run_dir, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot do this
        os.fsync(folder)  # the new name itself
    os.close(folder)


def try_checkpoint(run_dir: Path, args: Args, learner: Learner, counters: dict, log: Log) -> None:
    """Finish the log and write a checkpoint; where there is no room for it, say so and leave the last one."""
    log.flush(learner)
    try:
        save_checkpoint(run_dir, args, learner, counters)
    except OSError as error:
        warn(f"iteration {counters['iteration']}: no checkpoint was written, the last one stays: {error}")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this script, running nothing that the file contains; exit status 2 if it is not one."""
    if not os.path.isfile(path):  # unlike is_file it never raises
        fail(f"--resume {path.parent}: give the folder of a run, with its checkpoint.pt")
    # The types that an argument may have, or the values of a Literal.
    allowed = {field.name: {*(get_args(field.type) or [field.type])} for field in fields(Args)}
    for kinds in allowed.values():
        if float in kinds:
            kinds.add(int)  # 1 may be the default of a float
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} is corrupted")
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, counters = state["args"], state["counters"]
        if state["script"] != SCRIPT:
            raise ValueError(f"it was written by {state['script']}; resume it with that script")
        if state["version"] != CHECKPOINT_VERSION:
            raise ValueError(f"it has format version {state['version']}, this script reads {CHECKPOINT_VERSION}")
        same = {name for name in allowed if name in saved and {saved[name], type(saved[name])} & allowed[name]}
        if other := {*saved, *allowed} - same:
            raise ValueError(f"it was written with other arguments: {sorted(map(str, other))}")
        iteration, numbers = counters["iteration"], [*counters["rooms"], *counters["scores"]]
        if type(iteration) is not int or iteration < 0 or {type(number) for number in numbers} - {int, float}:
            raise ValueError(f"it counts {counters}")
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        fail(f"{path} is not a checkpoint of {SCRIPT}: {reason(error)}")
    check_args(Args(**saved))
    return state


def restore(state: dict, learner: Learner, path: Path) -> None:
    """Put a loaded checkpoint into the learner and the random generators; exit status 2 if it does not fit."""
    try:
        if other := {*vars(learner)} ^ {*state["learner"]}:
            raise ValueError(f"it was written with other parts of the Learner: {sorted(map(str, other))}")
        for name, part in vars(learner).items():
            fresh = [dict(group) for group in getattr(part, "param_groups", ())]
            part.load_state_dict(state["learner"][name])
            if isinstance(part, torch.optim.Optimizer):  # which itself compares neither settings nor shapes
                for group, own in zip(part.param_groups, fresh, strict=True):
                    if "capturable" in own:  # the run may come from another device
                        group["capturable"] = own["capturable"]
                    if {key: type(value) for key, value in group.items()} != {key: type(own[key]) for key in own}:
                        raise ValueError(f"{name} has other settings")
                for parameter, moments in part.state.items():
                    if not {moment.shape for moment in moments.values()} <= {parameter.shape, torch.Size()}:
                        raise ValueError(f"{name} belongs to another network")
        random.setstate(state["random"]["python"])
        np.random.set_state(tuple(state["random"]["numpy"]))
        torch.set_rng_state(state["random"]["torch"])
        if state["random"]["cuda"] is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state["random"]["cuda"])
    except Exception as error:
        fail(f"{path} does not fit this {SCRIPT}: {reason(error)}")


def parse_args() -> tuple[Args, Path, dict | None]:
    """The arguments, the run's folder and, with --resume, its checkpoint; exit status 2 if they are wrong."""
    summary = __doc__.splitlines()[0]
    args = tyro.cli(Args, description=summary)
    if args.resume is None:
        check_args(args)
        check_installed(args)
        args.run_name = args.run_name or f"{game_of(args)}__{SCRIPT}__{args.seed}__{int(time.time())}"
        run_dir = Path("runs", args.run_name)
        open_run(run_dir, new=True)
        return args, run_dir, None
    run_dir = Path(args.resume)
    saved = Args(**load_checkpoint(run_dir / "checkpoint.pt")["args"])
    check_installed(saved)
    args = tyro.cli(Args, description=summary, default=saved)
    most = max(args.total_timesteps, saved.total_timesteps)
    for name, value in asdict(replace(saved, resume=args.resume, total_timesteps=most)).items():
        if getattr(args, name) != value:
            hint = "it can only be raised" if name == "total_timesteps" else "leave it out, or start a new run"
            fail(f"{flag(name)} {getattr(args, name)} contradicts the saved {value}: {hint}")
    open_run(run_dir, new=False)
    # Read again: until the lock was free, its holder may have gone on.
    return args, run_dir, load_checkpoint(run_dir / "checkpoint.pt")


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning each to the system, and have them in huge pages.

    On a CPU every activation of every minibatch would otherwise be mapped and zeroed anew, page by small page. To be
    called after the environments are made, so that no worker process inherits it.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: take no block straight from the system
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
    size, libc.aligned_alloc.restype = ctypes.c_size_t(2**31), ctypes.c_void_p
    block = ctypes.c_void_p(libc.aligned_alloc(ctypes.c_size_t(mmap.PAGESIZE), size))
    if block:
        libc.madvise(block, size, mmap.MADV_HUGEPAGE)
        libc.free(block)  # at once: it has extended the heap, from which all others are cut


def catch_stop_signals() -> list[int]:
    """A list that receives the first SIGTERM or Ctrl-C, to look at between iterations; the next one kills at once."""
    caught: list[int] = []

    def catch(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        text = f"\n{signal.Signals(number).name}: stopping after this iteration; once more stops now\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # print may be at work below this handler, and cannot be entered twice

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


# ---- Main ------------------------------------------------------------------------------------------------------------


def main() -> None:
    args, run_dir, state = parse_args()
    resume_command = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    counters = state["counters"] if state else {"iteration": 0, "rooms": [], "scores": []}
    if counters["iteration"] >= num_iterations:
        say(f"{run_dir} is finished: {num_iterations * batch_size:,} steps; raise --total-timesteps", sys.stdout)
        return
    stop = catch_stop_signals()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        say("no CUDA device found: training on the CPU", sys.stderr)
    say(f"{run_dir} | {num_iterations:,} iterations of {batch_size:,} steps on {device}", sys.stdout)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.bf16  # of all products; see autocast
    if device.type == "cuda":
        torch.set_num_threads(1)  # more would wait actively and take the processors from the emulators
        torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # the default stream is left to the background
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    # Emulators cannot be saved: a resumed run starts new episodes, from seeds of their own.
    env_seed = int(np.random.SeedSequence([args.seed, counters["iteration"]]).generate_state(1)[0] >> 2)
    obs_stats = RunningMeanStd((1, 96, 96))
    try:
        if state is None:
            init_obs_stats(obs_stats, args, env_seed)
        # On a GPU two groups play while the network looks at the third; a CPU is busy either way.
        envs = AtariEnvs(args, env_seed, num_groups=3 if device.type == "cuda" else 1)
    except (EOFError, ConnectionError):
        if state is None:
            discard_run(run_dir)
        if stop:
            sys.exit(128 + stop[0])
        fail("an environment process died at the start", status=1)
    keep_freed_memory()
    learner = Learner(args, envs.num_actions, device)
    learner.obs_stats.load_state_dict(obs_stats.state_dict())
    if state:
        restore(state, learner, run_dir / "checkpoint.pt")
    try:
        if state is None:
            save_checkpoint(run_dir, args, learner, counters)
        log = Log(run_dir, args, counters["iteration"] * batch_size)
    except OSError as error:
        if state is None:
            discard_run(run_dir)
        fail(f"cannot write to {run_dir}: {error}")
    obs = torch.zeros(args.num_steps + 1, args.num_envs, 4, 96, 96, dtype=torch.uint8, device=device)
    scores = deque(counters["scores"], maxlen=100)
    if envs.rooms is not None:
        envs.rooms.update(counters["rooms"])
    progress = Progress(args, counters["iteration"] * batch_size)

    start, training = time.time(), None
    for iteration in range(counters["iteration"] + 1, num_iterations + 1):
        try:
            rollout = collect_rollout(envs, learner, obs, args, training)
        except (EOFError, ConnectionError):  # a game's process died, perhaps of a signal to the whole process group
            break
        finish(training, device)
        update_obs_stats(learner.obs_stats, obs[:-1].flatten(0, 1), rollout.valid_inds)
        int_rewards = intrinsic_rewards(learner, rollout, args)
        advantages, returns = estimate_advantages(rollout, int_rewards, args)
        losses, training = update(learner, rollout, advantages, returns, args)

        step = iteration * batch_size
        scores.extend(envs.returns)
        scalars = {f"losses/{name}": value for name, value in losses.items()}
        scalars["losses/explained_variance"] = explained_variance(rollout, advantages, returns, args)
        valid_rewards = int_rewards.flatten()[rollout.valid_inds]
        scalars["charts/intrinsic_reward"] = valid_rewards.mean()
        scalars["charts/intrinsic_reward_std"] = valid_rewards.std(correction=0)
        scalars["charts/learning_rate"] = args.learning_rate
        scalars["charts/SPS"], start = batch_size / (time.time() - start), time.time()
        if envs.returns:  # games that ended in this iteration
            scalars["charts/episodic_return"] = np.mean(envs.returns)
            scalars["charts/episodic_length"] = np.mean(envs.lengths)
            envs.returns, envs.lengths = [], []
        if envs.rooms is not None:
            scalars["charts/explored_rooms"] = len(envs.rooms)
        log.write(scalars, step)
        int_reward = scalars["charts/intrinsic_reward"].item()  # does not wait for the background
        progress.show(step, scores, envs.rooms, int_reward, iteration == num_iterations)
        counters = {"iteration": iteration, "rooms": sorted(envs.rooms or ()), "scores": list(scores)}
        if stop or iteration == num_iterations:
            break
        if iteration % args.checkpoint_interval == 0:
            finish(training, device)
            try_checkpoint(run_dir, args, learner, counters, log)

    envs.close()
    finish(training, device)  # what is learned is then as the last whole iteration left it
    try_checkpoint(run_dir, args, learner, counters, log)
    if counters["iteration"] == num_iterations:
        return
    if stop:
        say(f"\nstopped at step {counters['iteration'] * batch_size:,}; go on with: {resume_command}", sys.stdout)
        sys.exit(128 + stop[0])
    fail(f"an environment process died; go on with: {resume_command}", status=1)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # CUDA graphs, cuBLAS and CPUs run out of memory under names of their own
        if not re.search("out of memory|ALLOC_FAILED|allocate memory", f"{error} {error.__context__}"):
            raise
        fail("out of memory: lower --num-envs or --num-steps, or raise --num-minibatches", status=1)
