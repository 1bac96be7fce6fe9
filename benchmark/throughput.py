"""How fast a training script runs on this machine, and where the time of one of its iterations goes.

    python benchmark/throughput.py
    python benchmark/throughput.py --script ppo_rnd_atari --model A --num-envs 16 --num-minibatches 4

All other flags are the script's own. Its `main` runs with clocks around the functions that it calls. On a GPU it runs
twice: as it is, for the training rate, and waiting for the GPU after each part, for the parts.
"""

import contextlib
import importlib
import io
import itertools
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from cli import check_least, fail, one_line
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the folder above


@dataclass
class Options:
    script: Literal["ppo_rnd_atari", "ppo_snd_atari", "ppo_snd_entropy_atari"] = "ppo_snd_atari"
    """training script to measure; it gets all flags that are not listed here"""
    iterations: int = 5
    """iterations to run, at least 2, on a GPU 3: the first, there the first two, are not counted"""


# What each part of an iteration consists of; inference and rest are differences.
PARTS = {
    "environment": ["AtariEnvs.send", "AtariEnvs.recv"],
    "inference": [],
    "novelty rewards": ["update_obs_stats", "intrinsic_rewards", "entropy_rewards"],
    "advantages (GAE)": ["estimate_advantages"],
    "update": ["update"],
    "logging": ["log"],
    "rest": [],
}
PHASES = ["collect_rollout", "save_checkpoint", *itertools.chain(*PARTS.values())]


@contextlib.contextmanager
def timed(script: ModuleType, iterations: int, waiting: bool) -> Iterator[list[Counter]]:
    """While this is open, the list gets an entry for each iteration: the seconds of each phase, its start and end.

    With `waiting` a phase lasts until its work on the GPU is done.
    """
    measured: list[Counter] = []
    with tqdm(total=iterations, unit="iteration", disable=None) as bar, contextlib.ExitStack() as stack:
        for name in PHASES:
            owner_name, _, attribute = name.rpartition(".")
            owner = getattr(script, owner_name) if owner_name else script
            if hasattr(owner, attribute):  # only one script has entropy_rewards
                # Stepping the emulators is work of the host alone; waiting for the GPU there would measure something
                # else, and end any overlap of the two.
                wait = torch.cuda.synchronize if waiting and "AtariEnvs" not in name else lambda: None
                clocked = with_clock(name, getattr(owner, attribute), measured, wait, bar)
                stack.enter_context(patch.object(owner, attribute, clocked))
        yield measured


def with_clock(name: str, function: Callable, measured: list[Counter], wait: Callable[[], None], bar: tqdm) -> Callable:
    """`function`, adding its seconds to those of the present iteration; `wait` lets the device finish first."""

    def clocked(*args, **kwargs):
        wait()
        start = time.perf_counter()
        if name == "collect_rollout":  # with which an iteration begins
            measured.append(Counter(start=start))
        result = function(*args, **kwargs)
        wait()
        end = time.perf_counter()
        if measured:  # not while the frame statistics are started
            measured[-1][name] += end - start
        if name == "log":  # with which it ends
            measured[-1]["end"] = end
            bar.update()
        return result

    return clocked


def parts_of(iteration: Counter) -> dict[str, float]:
    """Seconds of each part of an iteration, and in "total"."""
    parts = {part: sum(iteration[name] for name in names) for part, names in PARTS.items()}
    parts["inference"] = iteration["collect_rollout"] - parts["environment"]
    total = iteration["end"] - iteration["start"]
    parts["rest"] = total - sum(parts.values())
    return parts | {"total": total}


def raw_environment_seconds(script: ModuleType, args: Any, repeats: int) -> list[float]:
    """Seconds of `num_steps` steps of all environments with random actions, `repeats` times after a warm-up."""
    envs, _, _ = script.make_envs(args, args.seed, args.num_envs)
    rng, num_actions = np.random.default_rng(args.seed), envs.single_action_space.n
    actions = rng.integers(num_actions, size=(args.num_steps, args.num_envs), dtype=np.int32)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for row in actions:
            envs.step(row)
        seconds.append(time.perf_counter() - start)
    envs.close()
    return seconds[1:]


def parse_args() -> tuple[Options, Any, list[str]]:
    """This program's options, the script's arguments, and the command line that gives it those."""
    options, flags = tyro.cli(Options, description=__doc__.splitlines()[0], return_unknown_args=True)
    script = importlib.import_module(options.script)
    argv = [f"{options.script}.py", "--norm-init-steps", "8", *flags]  # few, for the start is not measured
    with patch.object(sys, "argv", argv):
        args, _ = script.parse_args()
    argv += ["--total-timesteps", str(options.iterations * args.num_envs * args.num_steps)]
    args.cuda &= torch.cuda.is_available()
    check_least(options, iterations=3 if args.cuda else 2)  # the first are not counted
    return options, args, argv


def measure(script: ModuleType, args: Any, argv: list[str], iterations: int, waiting: bool) -> list[Counter]:
    """Run the script's `main` in a temporary folder; what `timed` measured. Exit status 1 if memory is short."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),  # it names files that are gone afterwards
        patch.object(sys, "argv", argv),
        patch.object(script, "catch_stop_signals", list),  # Ctrl-C ends everything at once
        timed(script, iterations, waiting) as measured,
    ):
        try:
            script.main()
        except torch.OutOfMemoryError as error:
            fail(f"out of memory: {one_line(error)}", status=1)
    return measured


def main() -> None:
    options, args, argv = parse_args()
    script, on_gpu, batch_size = importlib.import_module(options.script), args.cuda, args.num_envs * args.num_steps
    device, not_counted = torch.device("cuda" if on_gpu else "cpu"), 1 + on_gpu
    raw = raw_environment_seconds(script, args, options.iterations - 1)
    runs = [measure(script, args, argv, options.iterations, waiting) for waiting in [False, True][:not_counted]]
    peaks = {"host memory of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux: KiB
    if on_gpu:
        peaks["GPU memory"] = torch.cuda.max_memory_reserved()
    raw += raw_environment_seconds(script, args, options.iterations - 1)  # again: a shared machine's speed drifts

    ends = [iteration["end"] for iteration in runs[0][not_counted - 1 :]]
    iterations = [parts_of(iteration) for iteration in runs[-1][not_counted:]]
    seconds = {part: median(parts[part] for parts in iterations) for part in iterations[0]}
    rates = {
        "environments alone": batch_size / median(raw),
        "rollout alone": batch_size / median(parts["environment"] + parts["inference"] for parts in iterations),
        "update alone": batch_size / seconds["update"],
        "training": batch_size / median(after - before for before, after in itertools.pairwise(ends)),
    }
    name, cpus = torch.cuda.get_device_name() if on_gpu else platform.machine(), len(os.sched_getaffinity(0))
    precision = "bfloat16" if script.autocast(args, device)._enabled else "float32"
    lines = [
        f"{options.script}, model {args.model}, {args.num_envs} envs x {args.num_steps} steps, "
        f"{args.num_minibatches} minibatches x {args.update_epochs} epochs, {args.env_backend}",
        f"{name}, {cpus} CPUs, torch {torch.__version__}, policy in {precision}, "
        f"{'' if args.compile else 'not '}compiled",
        f"each figure is the median of {len(iterations)} iteration{'s' * (len(iterations) > 1)}; "
        f"the {'first two, a warm-up, are' if on_gpu else 'first one, a warm-up, is'} left out",
        "",
        f"{'':<38}{'steps/s':>10}",
    ]
    lines += [f"{name:<38}{rate:>10,.0f}" for name, rate in rates.items()]
    lines += [f"{'training / environments alone':<38}{rates['training'] / rates['environments alone']:>10.1%}"]
    heading = "one iteration, part after part" if on_gpu else "one iteration"
    lines += ["", f"{heading:<38}{'seconds':>10}{'share':>9}"]
    lines += [f"{part:<38}{s:>10.3f}{s / seconds['total']:>9.1%}" for part, s in seconds.items()]
    every = f"one checkpoint (every {args.checkpoint_interval} iterations)"
    lines += [f"{every:<38}{runs[0][-1]['save_checkpoint']:>10.3f}", ""]
    lines += [f"{f'peak {name}':<38}{size / 2**30:>10.2f} GiB" for name, size in peaks.items()]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
