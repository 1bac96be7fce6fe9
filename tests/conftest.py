"""What the test files share: the three scripts as modules, tiny arguments, recorded play, training iterations."""

import copy
import functools
import importlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks do not gain from more, and tests run side by side

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

RND, SND, ENTROPY = SCRIPTS = ["ppo_rnd_atari", "ppo_snd_atari", "ppo_snd_entropy_atari"]
BACKENDS = ["envpool", "gymnasium"]
GAMES = ["MontezumaRevenge", "Gravitar", "Venture", "Pitfall", "PrivateEye", "Solaris", "Breakout", "MsPacman"]

STARTED: list[subprocess.Popen] = []  # processes of the running test, each the leader of a group


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """End what a failed test left running."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the three scripts in turn."""
    return importlib.import_module(request.param)


@pytest.fixture(params=SCRIPTS[1:])
def snd_script(request: pytest.FixtureRequest) -> ModuleType:
    """The two scripts with a trained target in turn."""
    return importlib.import_module(request.param)


@pytest.fixture
def snd() -> ModuleType:
    """The SND script, for what test_in_step.py proves to be the same in all three."""
    return importlib.import_module(SND)


def make_args(script: ModuleType, **changes: object) -> object:
    """Arguments of a tiny Breakout run in float32 on the CPU."""
    tiny = dict(env_id="BreakoutNoFrameskip-v4", model="A", num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1)
    return script.Args(**(tiny | dict(norm_init_steps=2, bf16=False, cuda=False) | changes))


def make_learner(script: ModuleType, args: object, num_actions: int = 4) -> object:
    """A learner on the CPU with fixed random weights; built once, for orthogonal weights take their time."""
    return copy.deepcopy(built_learner(script, args.model, num_actions, args.num_envs))


@functools.cache
def built_learner(script: ModuleType, model: str, num_actions: int, num_envs: int) -> object:
    """The learner that `make_learner` copies."""
    torch.manual_seed(3)
    return script.Learner(make_args(script, model=model, num_envs=num_envs), num_actions, torch.device("cpu"))


def num_heads(script: ModuleType) -> int:
    """Value heads of a script."""
    return 3 if script.__name__ == ENTROPY else 2


def empty_obs(args: object) -> Tensor:
    """The frame buffer of a rollout, (T + 1, N, 4, 96, 96) uint8."""
    return torch.zeros(args.num_steps + 1, args.num_envs, 4, 96, 96, dtype=torch.uint8)


def make_rollout(script: ModuleType, dones: Tensor, terminations: Tensor, first_valid: Tensor, seed: int = 0) -> object:
    """A rollout of random numbers (and random frames) around given ends (T, N); `first_valid` (N,) is row 0's."""
    generator = torch.Generator().manual_seed(seed)
    shape = dones.shape
    valid = torch.cat([first_valid[None], ~dones[:-1]])
    obs = torch.randint(256, (shape[0] + 1, shape[1], 4, 96, 96), dtype=torch.uint8, generator=generator)
    return script.Rollout(
        obs=obs,
        actions=torch.randint(4, shape, generator=generator),
        logprobs=-torch.rand(shape, generator=generator) - 1,
        values=torch.randn(shape[0] + 1, shape[1], num_heads(script), generator=generator),
        ext_rewards=torch.randint(-1, 2, shape, generator=generator).float() * valid,
        terminations=terminations,
        dones=dones,
        valid=valid,
        valid_inds=torch.from_numpy(np.flatnonzero(valid.numpy())),
    )


def random_rollout(script: ModuleType, num_steps: int, num_envs: int, seed: int = 0) -> object:
    """A rollout of random numbers and random frames in which a fifth of the rows end an episode."""
    rng = np.random.default_rng(seed)
    dones = rng.random((num_steps, num_envs)) < 0.2
    dones[1:] &= ~dones[:-1]  # a reset row ends nothing
    terminations = dones & (rng.random(dones.shape) < 0.5)
    return make_rollout(
        script, torch.from_numpy(dones), torch.from_numpy(terminations), torch.from_numpy(rng.random(num_envs) < 0.8)
    )


def reward_and_estimate(
    script: ModuleType, learner: object, rollout: object, args: object, buffer: object = None
) -> tuple[tuple, object]:
    """The steps of `main` between rollout and update: the arguments of `update` after `rollout`, and the buffer."""
    script.update_obs_stats(learner.obs_stats, rollout.obs[:-1].flatten(0, 1), rollout.valid_inds)
    rewards, extra = script.intrinsic_rewards(learner, rollout, args), ()
    if script.__name__ == RND:
        rewards, extra = rewards[0], rewards[1:]
    streams = [rewards]
    if script.__name__ == ENTROPY:
        entropy_rewards, buffer = script.state_entropy_rewards(learner, rollout, buffer, args)
        streams.append(entropy_rewards)
    return (*script.estimate_advantages(rollout, *streams, args), *extra), buffer


def train(script: ModuleType, args: object, iterations: int) -> object:
    """Train as `main` does, in this process; returns the learner."""
    envs = script.AtariEnvs(args, args.seed)
    learner = make_learner(script, args, envs.num_actions)
    script.init_obs_stats(learner.obs_stats, args, args.seed)
    obs, buffer = empty_obs(args), None
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    for _ in range(iterations):
        rollout = script.collect_rollout(envs, learner, obs, args)
        inputs, buffer = reward_and_estimate(script, learner, rollout, args, buffer)
        script.update(learner, rollout, *inputs, args)
    envs.close()
    return learner


class Recorder:
    """Real environments that are played at random or by a learner, with everything they returned."""

    def __init__(self, script: ModuleType, args: object, seed: int = 1):
        self.envs = script.AtariEnvs(args, seed)
        self.obs, self.dones = [self.envs.next_obs.copy()], [self.envs.next_done.copy()]
        self.ram, self.infos, self.rewards, self.terminations = [self.envs.ram.copy()], [], [], []
        (backend,), wait = self.envs.envs, self.envs.step_wait  # on a CPU all games form one group
        receive_name = "recv" if hasattr(backend, "recv") else "step_wait"
        receive = getattr(backend, receive_name)

        def recorded_receive() -> tuple:
            result = receive()
            self.infos.append({name: np.copy(result[4][name]) for name in ("reward", "terminated", "ram")})
            return result

        def recorded_wait(group: int) -> tuple:
            result = rewards, terminations, dones = wait(group)
            for record, value in (
                (self.obs, self.envs.next_obs),
                (self.rewards, rewards),
                (self.terminations, terminations),
                (self.dones, dones),
                (self.ram, self.envs.ram),
            ):
                record.append(value.copy())
            return result

        setattr(backend, receive_name, recorded_receive)
        self.envs.step_wait = recorded_wait

    def play(self, steps: int, seed: int = 0) -> "Recorder":
        """Random actions; returns the recorder itself, closed."""
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            self.envs.step(rng.integers(self.envs.num_actions, size=len(self.envs.next_done), dtype=np.int32))
        self.envs.close()
        return self


@pytest.fixture
def short_episodes(snd: ModuleType, monkeypatch: pytest.MonkeyPatch) -> int:
    """Truncate the episodes of the SND script's environments after this many agent steps."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 25)
    return 25


# Environment variables of the subprocesses: without this process's module path.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run_script(script: str | Path, flags: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a script to its end in a folder of its own."""
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    command = [sys.executable, str(path), *flags]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
