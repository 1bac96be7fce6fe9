"""How fast a training script runs on this machine, and where the time of one of its iterations goes.

    python benchmark/throughput.py --script ppo_snd_atari --model C --num-envs 128
    python benchmark/throughput.py --script ppo_rnd_atari --model A --num-envs 16 --num-minibatches 4 --out speed.json

The script's own `main` runs, in a temporary folder, with clocks around the functions that it calls; nothing of its
loop is repeated here. Before and after it, as many environments are stepped, all at once, with random actions and
nothing else: the emulators' own speed. Every figure is a median over the iterations but the first; on a GPU the second,
in which kernels are recorded, is left out too, and `main` runs twice: once as it is, for the training rate, and once
waiting for the GPU after each part, for the parts.
"""

import contextlib
import importlib
import itertools
import json
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from cli import check_output, fail

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the folder above

Script = Literal["ppo_rnd_atari", "ppo_snd_atari", "ppo_snd_entropy_atari"]


@dataclass
class Options:
    script: Script = "ppo_snd_atari"
    """training script to measure"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes the GPU if there is one"""
    iterations: int = 5
    """iterations to run, at least 2, on a GPU 3: the first, there the first two, are not counted"""
    out: Path | None = None
    """JSON file for the figures"""

    # handed on to the script
    env_id: str = "MontezumaRevengeNoFrameskip-v4"
    """the game"""
    env_backend: Literal["envpool", "gymnasium"] = "envpool"
    """EnvPool, or ale-py behind gymnasium's vector interface"""
    model: Literal["A", "B", "C", "D"] = "C"
    """architecture of policy and value"""
    num_envs: int = 128
    """games played side by side"""
    num_steps: int = 128
    """steps of each environment between two updates"""
    num_minibatches: int = 32
    """minibatches an epoch"""
    update_epochs: int = 4
    """passes over each rollout"""
    bf16: bool = True
    """run the policy in bfloat16 where the script does so"""
    compile: bool = False
    """compile the networks with torch.compile"""


# Handed on as they are.
SCRIPT_FIELDS = ["env_id", "env_backend", "model", "num_envs", "num_steps", "num_minibatches", "update_epochs"]
SCRIPT_FIELDS += ["bf16", "compile"]
NORM_INIT_STEPS = 8  # only of the start, which is not measured

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
PHASES = ["collect_rollout", "save_checkpoint"] + [name for names in PARTS.values() for name in names]

Call = tuple[str, float, float]  # name, start and end in seconds


def script_flags(values: dict) -> list[str]:
    """Command line of {field: value}, as tyro reads it: num_envs=8 is `--num-envs 8`, bf16=False is `--no-bf16`."""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def run_main(script: ModuleType, values: dict, folder: Path) -> None:
    """Run the script's `main` with the arguments `values` in `folder`; its output goes to standard error."""
    handlers = {number: script.signal.getsignal(number) for number in (script.signal.SIGINT, script.signal.SIGTERM)}
    argv = [f"{script.SCRIPT}.py", *script_flags(values)]
    try:
        with patch.object(sys, "argv", argv), contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
            script.main()
    except RuntimeError as error:  # CUDA graphs, cuBLAS and CPUs run out of memory under names of their own
        if not re.search("out of memory|ALLOC_FAILED|allocate memory", f"{error} {error.__context__}"):
            raise
        fail("out of memory: lower --num-envs or --num-steps, or raise --num-minibatches", status=1)
    finally:
        for number, handler in handlers.items():
            script.signal.signal(number, handler)


@contextlib.contextmanager
def timed(script: ModuleType, calls: list[Call], waiting: bool) -> Iterator[None]:
    """While this is open, `calls` receives every call of a phase of `script`; `waiting`: and of its work on the GPU."""
    with contextlib.ExitStack() as stack:
        for name in PHASES:
            owner_name, _, attribute = name.rpartition(".")
            owner = getattr(script, owner_name) if owner_name else script
            if hasattr(owner, attribute):  # only one script has entropy_rewards
                # Stepping the emulators is work of the host alone; waiting for the GPU there would measure something
                # else, and end any overlap of the two.
                wait = torch.cuda.synchronize if waiting and "AtariEnvs" not in name else lambda: None
                clocked = with_clock(name, getattr(owner, attribute), calls, wait)
                stack.enter_context(patch.object(owner, attribute, clocked))
        yield


def with_clock(name: str, function: Callable, calls: list[Call], wait: Callable[[], None]) -> Callable:
    """`function`, leaving its name, start and end in `calls`; `wait` lets the device finish first."""

    def clocked(*args, **kwargs):
        wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        calls.append((name, start, time.perf_counter()))
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


def raw_environment_seconds(script: ModuleType, args: object, repeats: int) -> list[float]:
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


def uses_gpu(options: Options) -> bool:
    """Whether `--device` and the machine put the training on a GPU."""
    return options.device != "cpu" and torch.cuda.is_available()


def measure(options: Options) -> dict:
    """Everything that the table shows, as plain numbers: seconds, steps per second, bytes."""
    script = importlib.import_module(options.script)
    on_gpu = uses_gpu(options)
    batch_size = options.num_envs * options.num_steps
    values = {name: getattr(options, name) for name in SCRIPT_FIELDS}
    values |= {"cuda": on_gpu, "total_timesteps": options.iterations * batch_size, "norm_init_steps": NORM_INIT_STEPS}
    args = script.Args(**values)
    script.check_args(args)

    repeats, calls, waiting_calls = options.iterations - 1, [], []
    raw = raw_environment_seconds(script, args, repeats)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for run_calls, waiting in [(calls, False), (waiting_calls, True)][: 1 + on_gpu]:
        with tempfile.TemporaryDirectory() as folder, timed(script, run_calls, waiting):
            run_main(script, values, Path(folder))
    peak_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak_gpu = torch.cuda.max_memory_reserved() if on_gpu else None
    raw += raw_environment_seconds(script, args, repeats)  # again, for the speed of a shared machine drifts

    iterations = iteration_parts(waiting_calls or calls)[1 + on_gpu :]
    log_times = [end for name, _, end in calls if name == "log"]
    training = statistics.median(end - start for start, end in itertools.pairwise(log_times[on_gpu:]))
    seconds = {part: statistics.median(parts[part] for parts in iterations) for part in iterations[0]}
    rollout = statistics.median(parts["environment"] + parts["inference"] for parts in iterations)
    raw_rate, training_rate = batch_size / statistics.median(raw), batch_size / training
    return {
        "options": {name: value for name, value in asdict(options).items() if name != "out"},
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
        },
        "bf16_used": script.autocast(args, torch.device("cuda" if on_gpu else "cpu"))._enabled,
        "steps_per_second": {
            "environments alone": raw_rate,
            "rollout alone": batch_size / rollout,
            "update alone": batch_size / seconds["update"],
            "training": training_rate,
        },
        "training_to_raw_environment": training_rate / raw_rate,
        "seconds_per_iteration": seconds,
        "checkpoint_seconds": statistics.median(end - start for name, start, end in calls if name == "save_checkpoint"),
        "checkpoint_interval": args.checkpoint_interval,
        "peak_host_bytes": peak_host,
        "peak_gpu_bytes": peak_gpu,
        "iterations": iterations,
        "raw_environment_seconds": raw,
    }


def table(figures: dict) -> str:
    """The figures for people."""
    options, machine, seconds = figures["options"], figures["machine"], figures["seconds_per_iteration"]
    lines = [
        f"{options['script']}, model {options['model']}, {options['num_envs']} envs x {options['num_steps']} steps, "
        f"{options['num_minibatches']} minibatches x {options['update_epochs']} epochs, {options['env_backend']}",
        f"{machine['device']}, {machine['cpus']} CPUs, torch {machine['torch']}, policy in "
        f"{'bfloat16' if figures['bf16_used'] else 'float32'}, {'' if options['compile'] else 'not '}compiled; "
        f"medians of {len(figures['iterations'])}",
        "",
        f"{'':<38}{'steps/s':>10}",
    ]
    lines += [f"{name:<38}{rate:>10,.0f}" for name, rate in figures["steps_per_second"].items()]
    lines += [f"{'training / environments alone':<38}{figures['training_to_raw_environment']:>10.1%}"]
    heading = "one iteration" if figures["peak_gpu_bytes"] is None else "one iteration, part after part"
    lines += ["", f"{heading:<38}{'seconds':>10}{'share':>9}"]
    lines += [f"{part:<38}{s:>10.3f}{s / seconds['total']:>9.1%}" for part, s in seconds.items()]
    every = f"one checkpoint (every {figures['checkpoint_interval']} iterations)"
    lines += [f"{every:<38}{figures['checkpoint_seconds']:>10.3f}", ""]
    lines += [f"{'peak host memory of this process':<38}{figures['peak_host_bytes'] / 2**30:>10.2f} GiB"]
    if figures["peak_gpu_bytes"] is not None:
        lines += [f"{'peak GPU memory':<38}{figures['peak_gpu_bytes'] / 2**30:>10.2f} GiB"]
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__.splitlines()[0])
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA device")
    if options.iterations < 2 + uses_gpu(options):
        fail(f"--iterations {options.iterations}: must be at least 2, on a GPU 3, for the first are not counted")
    if options.out:
        check_output(options.out)
    figures = measure(options)
    print(table(figures))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
