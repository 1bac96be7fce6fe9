"""How fast a training script runs on this machine, and where the time of one of its iterations goes.

    python benchmark/throughput.py
    python benchmark/throughput.py --script ppo_rnd_atari --model A --num-envs 16 --num-minibatches 4 --out speed.json

All other flags are the script's own (python ppo_snd_atari.py --help). Its `main` runs, in a temporary folder, with
clocks around the functions that it calls; nothing of its loop is repeated here. Before and after it, as many
environments are stepped, all at once, with random actions and nothing else: the emulators' own speed. Every figure is a
median over the iterations but the first; on a GPU the second, in which kernels are recorded, is left out too, and
`main` runs twice: once as it is, for the training rate, and once waiting for the GPU after each part, for the parts.
"""

import contextlib
import importlib
import io
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from cli import check_least, make_folder_of
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the folder above


@dataclass
class Options:
    script: Literal["ppo_rnd_atari", "ppo_snd_atari", "ppo_snd_entropy_atari"] = "ppo_snd_atari"
    """training script to measure; it gets all flags that are not listed here"""
    iterations: int = 5
    """iterations to run, at least 2, on a GPU 3: the first, there the first two, are not counted"""
    out: Path | None = None
    """JSON file for the figures"""


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

Call = tuple[str, float, float]  # name, start and end in seconds


@contextlib.contextmanager
def timed(script: ModuleType, iterations: int, waiting: bool) -> Iterator[list[Call]]:
    """While this is open, the list receives every call of a phase of `script`; `waiting`: with its work on the GPU."""
    calls: list[Call] = []
    with tqdm(total=iterations, unit="iteration", disable=None) as bar, contextlib.ExitStack() as stack:
        for name in PHASES:
            owner_name, _, attribute = name.rpartition(".")
            owner = getattr(script, owner_name) if owner_name else script
            if hasattr(owner, attribute):  # only one script has entropy_rewards
                # Stepping the emulators is work of the host alone; waiting for the GPU there would measure something
                # else, and end any overlap of the two.
                wait = torch.cuda.synchronize if waiting and "AtariEnvs" not in name else lambda: None
                clocked = with_clock(name, getattr(owner, attribute), calls, wait, bar)
                stack.enter_context(patch.object(owner, attribute, clocked))
        yield calls


def with_clock(name: str, function: Callable, calls: list[Call], wait: Callable[[], None], bar: tqdm) -> Callable:
    """`function`, leaving its name, start and end in `calls`; `wait` lets the device finish first."""

    def clocked(*args, **kwargs):
        wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        calls.append((name, start, time.perf_counter()))
        bar.update(name == "log")  # which ends an iteration
        return result

    return clocked


def iteration_parts(calls: list[Call]) -> list[dict[str, float]]:
    """Seconds of each part, and in "total", of every iteration: from the start of its rollout to its log line."""
    rollouts = [(start, end) for name, start, end in calls if name == "collect_rollout"]
    ends = [end for name, _, end in calls if name == "log"]
    iterations = []
    for (start, rollout_end), end in zip(rollouts, ends, strict=True):
        inside = [(name, last - first) for name, first, last in calls if start <= first and last <= end]
        parts = {part: sum(s for name, s in inside if name in names) for part, names in PARTS.items()}
        parts["inference"] = rollout_end - start - parts["environment"]
        parts["rest"] = end - start - sum(parts.values())
        iterations.append(parts | {"total": end - start})
    return iterations


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
    if options.out:
        make_folder_of(options.out)
    return options, args, argv


def measure(options: Options, args: Any, argv: list[str]) -> dict:
    """Everything that the table shows, as plain numbers: seconds, steps per second, bytes."""
    script, batch_size = importlib.import_module(options.script), args.num_envs * args.num_steps
    on_gpu, repeats, runs = args.cuda, options.iterations - 1, []
    raw = raw_environment_seconds(script, args, repeats)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for waiting in [False, True][: 1 + on_gpu]:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(io.StringIO()),  # it names files that are gone afterwards
            patch.object(sys, "argv", argv),
            patch.object(script, "catch_stop_signals", list),  # Ctrl-C ends everything at once
            timed(script, options.iterations, waiting) as calls,
        ):
            script.main()
        runs.append(calls)
    peak_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    peak_gpu = torch.cuda.max_memory_reserved() if on_gpu else None
    raw += raw_environment_seconds(script, args, repeats)  # again, for the speed of a shared machine drifts

    iterations = iteration_parts(runs[-1])[1 + on_gpu :]
    log_times = [end for name, _, end in runs[0] if name == "log"]
    training = median(end - start for start, end in itertools.pairwise(log_times[on_gpu:]))
    seconds = {part: median(parts[part] for parts in iterations) for part in iterations[0]}
    rollout = median(parts["environment"] + parts["inference"] for parts in iterations)
    raw_rate, training_rate = batch_size / median(raw), batch_size / training
    return {
        "script": options.script,
        "args": asdict(args),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "bf16_used": script.autocast(args, torch.device("cuda" if on_gpu else "cpu"))._enabled,
        "steps_per_second": {
            "environments alone": raw_rate,
            "rollout alone": batch_size / rollout,
            "update alone": batch_size / seconds["update"],
            "training": training_rate,
        },
        "training_to_raw_environment": training_rate / raw_rate,
        "seconds_per_iteration": seconds,
        "checkpoint_seconds": median(end - start for name, start, end in runs[0] if name == "save_checkpoint"),
        "peak_host_bytes": peak_host,
        "peak_gpu_bytes": peak_gpu,
        "iterations": iterations,
        "raw_environment_seconds": raw,
    }


def table(figures: dict) -> str:
    """The figures for people."""
    args, seconds = figures["args"], figures["seconds_per_iteration"]
    counted, gpu_bytes = len(figures["iterations"]), figures["peak_gpu_bytes"]
    warm_up = "first one, a warm-up, is" if gpu_bytes is None else "first two, a warm-up, are"
    lines = [
        f"{figures['script']}, model {args['model']}, {args['num_envs']} envs x {args['num_steps']} steps, "
        f"{args['num_minibatches']} minibatches x {args['update_epochs']} epochs, {args['env_backend']}",
        f"{figures['device']}, {figures['cpus']} CPUs, torch {figures['torch']}, policy in "
        f"{'bfloat16' if figures['bf16_used'] else 'float32'}, {'' if args['compile'] else 'not '}compiled",
        f"each figure is the median of {counted} iteration{'s' * (counted > 1)}; the {warm_up} left out",
        "",
        f"{'':<38}{'steps/s':>10}",
    ]
    lines += [f"{name:<38}{rate:>10,.0f}" for name, rate in figures["steps_per_second"].items()]
    lines += [f"{'training / environments alone':<38}{figures['training_to_raw_environment']:>10.1%}"]
    heading = "one iteration" if gpu_bytes is None else "one iteration, part after part"
    lines += ["", f"{heading:<38}{'seconds':>10}{'share':>9}"]
    lines += [f"{part:<38}{s:>10.3f}{s / seconds['total']:>9.1%}" for part, s in seconds.items()]
    every = f"one checkpoint (every {args['checkpoint_interval']} iterations)"
    lines += [f"{every:<38}{figures['checkpoint_seconds']:>10.3f}", ""]
    for name, size in {"host memory of this process": figures["peak_host_bytes"], "GPU memory": gpu_bytes}.items():
        lines += [f"{f'peak {name}':<38}{size / 2**30:>10.2f} GiB"] if size else []
    return "\n".join(lines)


def main() -> None:
    options, args, argv = parse_args()
    figures = measure(options, args, argv)
    print(table(figures))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
