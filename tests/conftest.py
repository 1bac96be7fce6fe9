"""What the test files share: the three scripts as modules, tiny arguments, recorded play, a step of training.

What test_in_step.py proves to be the same in all three is tested with the SND script alone.
"""

import copy
import functools
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_args(script: ModuleType, **changes: object) -> object:
    """Arguments of a tiny Breakout run in float32 on the CPU."""
    tiny = dict(env_id="BreakoutNoFrameskip-v4", model="A", num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1)
    return script.Args(**(tiny | dict(norm_init_steps=2, bf16=False, cuda=False) | changes))


def make_learner(script: ModuleType, args: object, num_actions: int = 4) -> object:
    """A learner on the CPU with fixed random weights; built once, for orthogonal weights take their time."""
    return copy.deepcopy(built_learner(script, args.model, num_actions, args.num_envs, args.norm_int_reward))


@functools.cache
def built_learner(script: ModuleType, model: str, num_actions: int, num_envs: int, norm_int_reward: bool) -> object:
    """The learner that `make_learner` copies."""
    torch.manual_seed(3)
    args = make_args(script, model=model, num_envs=num_envs, norm_int_reward=norm_int_reward)
    return script.Learner(args, num_actions, torch.device("cpu"))


def make_rollout(script: ModuleType, dones: Tensor, terminations: Tensor, first_valid: Tensor, seed: int = 0) -> object:
    """A rollout of random numbers and frames around given ends (T, N); `first_valid` (N,) is row 0's."""
    generator = torch.Generator().manual_seed(seed)
    shape, num_heads = dones.shape, 3 if script.__name__ == ENTROPY else 2
    valid = torch.cat([first_valid[None], ~dones[:-1]])
    return script.Rollout(
        obs=torch.randint(256, (shape[0] + 1, shape[1], 4, 96, 96), dtype=torch.uint8, generator=generator),
        actions=torch.randint(4, shape, generator=generator),
        logprobs=-torch.rand(shape, generator=generator) - 1,
        values=torch.randn(shape[0] + 1, shape[1], num_heads, generator=generator),
        ext_rewards=torch.randint(-1, 2, shape, generator=generator).float() * valid,
        terminations=terminations,
        dones=dones,
        valid=valid,
        valid_inds=torch.from_numpy(np.flatnonzero(valid.numpy())),
    )


def random_rollout(script: ModuleType, num_steps: int = 8, num_envs: int = 4) -> object:
    """A rollout of random numbers and frames in which a fifth of the rows end an episode."""
    rng = np.random.default_rng(0)
    dones = rng.random((num_steps, num_envs)) < 0.2
    dones[1:] &= ~dones[:-1]  # a reset row ends nothing
    terminations, first_valid = dones & (rng.random(dones.shape) < 0.5), rng.random(num_envs) < 0.8
    return make_rollout(script, *map(torch.from_numpy, (dones, terminations, first_valid)))


def reward_and_estimate(
    script: ModuleType, learner: object, rollout: object, args: object, ring: object = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The steps of `main` between rollout and update: intrinsic rewards, and what `update` takes after the rollout."""
    script.update_obs_stats(learner.obs_stats, rollout)
    rewards, features = script.intrinsic_rewards(learner, rollout, args), []
    if script.__name__ == RND:
        rewards, *features = rewards
    streams = [rewards]
    if script.__name__ == ENTROPY:
        ring = ring or script.FeatureRing(args.entropy_buffer_size)
        streams.append(script.entropy_rewards(learner, rollout, ring, args))
    return streams, [*script.estimate_advantages(rollout, *streams, args), *features]


def update(script: ModuleType, learner: object, rollout: object, inputs: tuple, args: object) -> dict[str, Tensor]:
    """The script's `update` with its functions bound as in `main` on a CPU."""
    steps = [partial(step, learner, args) for step in (script.train_policy, script.train_novelty)]
    return script.update(rollout, *inputs, *steps, args)


class Recorder:
    """Real environments, played at random or by a learner, with everything they returned.

    Attributes:
        obs, resets: what was known before each step and after the last.
        rewards, terminations, dones: what each step returned.
        infos: the backend's own, with its `truncated` beside them.
    """

    def __init__(self, script: ModuleType, args: object, seed: int = 1):
        self.envs = script.AtariEnvs(args, seed)
        self.obs, self.resets = [self.envs.next_obs[0].copy()], [self.envs.resets.copy()]
        self.rewards, self.terminations, self.dones, self.infos = [], [], [], []
        (backend,) = self.envs.envs  # all games form one group
        backend_recv, recv = backend.recv, self.envs.recv

        def recorded_backend_recv() -> tuple:
            result = backend_recv()
            self.infos.append(copy.deepcopy(result[4]) | {"truncated": result[3].copy()})
            return result

        def recorded_recv(group: int) -> tuple:
            result = recv(group)
            records = self.rewards, self.terminations, self.dones, self.obs, self.resets
            for record, value in zip(records, (*result, self.envs.next_obs[0], self.envs.resets), strict=True):
                record.append(value.copy())
            return result

        backend.recv, self.envs.recv = recorded_backend_recv, recorded_recv

    def step(self, actions: np.ndarray) -> None:
        """One step of every game with actions (N,)."""
        self.envs.send(0, actions.astype(np.int32))
        self.envs.recv(0)

    def play(self, steps: int, seed: int = 0) -> "Recorder":
        """Random actions; returns the recorder itself, stacked."""
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            self.step(rng.integers(self.envs.num_actions, size=len(self.envs.resets), dtype=np.int32))
        return self.stack()

    def stack(self) -> "Recorder":
        """Make arrays of the records; returns the recorder itself."""
        for name in ("obs", "resets", "rewards", "terminations", "dones"):
            setattr(self, name, np.stack(getattr(self, name)))
        return self


# Environment variables of the subprocesses: without this process's module path.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run_script(script: str | Path, flags: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a script, named without its ending, to its end in a folder of its own."""
    command = [sys.executable, f"{ROOT / script}.py", *flags]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
