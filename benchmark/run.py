"""Runs commands x games x seeds, some side by side, on this machine or on a SLURM cluster.

    python benchmark/run.py --commands ppo_rnd_c0 "python ppo_rnd_atari.py --model C" --env-ids VentureNoFrameskip-v4
    python benchmark/run.py --commands a "python a.py" b "python b.py" --env-ids ALE/Pitfall-v5 --workers 2 -- --model A
    python benchmark/run.py ... --dry-run
    python benchmark/run.py ... --slurm-partition gpu --workers 8

Every run has its folder runs/COMMAND/GAME/seed_N and, beside it, its log runs/COMMAND/GAME/seed_N.log. After a stop, a
crash or a power cut start the same line again: what is finished is skipped, what was cut off is resumed. Never start a
line twice at once: both would write the same runs. Flags after `--` are added to every command. Exit status: 0 all
finished (or submitted), 1 a run failed, 2 wrong usage, 130 stopped.
"""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import submitit
import tyro
from cli import check_least, fail
from rich.console import Console
from rich.live import Live
from rich.table import Table


@dataclass
class Args:
    commands: list[tuple[str, str]]
    """names and commands of the methods: NAME "COMMAND" NAME "COMMAND" ..."""
    env_ids: list[str]
    """games, e.g. MontezumaRevengeNoFrameskip-v4 ALE/Venture-v5"""
    num_seeds: int = 3
    """runs of each command in each game"""
    start_seed: int = 1
    """seed of the first of them; the others count up"""
    total_timesteps: int | float = 128_000_000
    """agent steps of each run; raise it to go on with finished runs"""
    workers: int = 1
    """runs side by side; on this machine they share out its cores and GPUs"""
    dry_run: bool = False
    """print the commands and stop"""
    slurm_partition: str | None = None
    """submit the runs to this partition of a SLURM cluster, instead of running them here"""
    slurm_minutes: int = 1440
    """time limit of a job; a run that needs longer is put back into the queue and resumed"""
    slurm_gpus: int = 1
    """GPUs of a job"""
    slurm_cpus: int = 8
    """cores of a job"""
    slurm_options: dict[str, str] = field(default_factory=dict)
    """any other options of sbatch, e.g. --slurm-options account my-group mem 64G"""


@dataclass
class Run:
    """One command on one game with one seed."""

    name: str  # of the folder below runs/
    command: list[str]

    @property
    def folder(self) -> Path:
        return Path("runs", self.name)

    @property
    def log(self) -> Path:
        return Path("runs", f"{self.name}.log")

    def full_command(self) -> list[str]:
        """The command, with --resume if there is a checkpoint to go on from."""
        resume = ["--resume", str(self.folder)] if (self.folder / "checkpoint.pt").exists() else []
        return self.command + resume


def make_runs(args: Args, extra_flags: list[str]) -> list[Run]:
    """All runs, first seeds first; exit status 2 for arguments that make no runs."""
    check_least(args, num_seeds=1, start_seed=0, total_timesteps=1, workers=1)
    check_least(args, slurm_minutes=5, slurm_gpus=0, slurm_cpus=1)
    seeds, runs = range(args.start_seed, args.start_seed + args.num_seeds), {}
    for seed, (method, command), env_id in itertools.product(seeds, args.commands, args.env_ids):
        game = re.sub(r"^ALE/|NoFrameskip-v4$|-v5$", "", env_id)
        name = f"{method}/{game}/seed_{seed}"
        if not re.fullmatch(r"[^\W_][\w.+-]*/\w+/seed_\d+", name):
            fail(f"{method!r} in {env_id!r} makes no folder: a method's name has letters, digits and, later, _ . + -")
        if name in runs:
            fail(f"{method} in {game} is given twice")
        try:
            words = shlex.split(command)
        except ValueError as error:
            fail(f"--commands {method} {command!r}: {error}")
        words += f"--run-name {name} --env-id {env_id} --seed {seed} --total-timesteps {args.total_timesteps}".split()
        runs[name] = Run(name, words + extra_flags)
    if not runs:
        fail("--commands and --env-ids need at least one entry each")
    return list(runs.values())


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; "" if there is none."""
    with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


# Exit statuses of a run that was asked to stop: after its checkpoint, or before there was anything to save.
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


def start(run: Run, env: dict[str, str], before: Callable) -> subprocess.Popen:
    """Start a run in a session of its own, so that a terminal's Ctrl-C does not reach it; `before` runs in the child.

    "python" means the interpreter of this program. The run's output is added to its log. Raises OSError.
    """
    command = run.full_command()
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a") as log:
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        if command[0] == "python":
            command[0] = sys.executable
        return subprocess.Popen(
            command,
            env=os.environ | env,
            preexec_fn=before,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


class Report:
    """What became of each run: a line for every event and, in a terminal, a live table of the runs going on."""

    def __init__(self, runs: list[Run]):
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.total, self.count = len(runs), {"finished": 0, "failed": 0, "stopped": 0}
        self.failures: list[str] = []

    def show(self, draw: Callable, *what: object, **how: object) -> None:
        """Call a method of rich; where the terminal or the pipe is gone or the disk is full, go on in silence."""
        try:
            draw(*what, **how)
        except (OSError, SystemExit):  # of a broken pipe rich makes a SystemExit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say(self, line: str) -> None:
        """Print a line."""
        self.show(self.console.print, line)

    def ended(self, run: Run, outcome: str, reason: str = "") -> None:
        """outcome is a key of `count`; reason says why a run failed."""
        self.count[outcome] += 1
        line = f"{outcome:<9} {run.name}" + (f": {reason} (log {run.log})" if reason else "")
        self.say(line)
        if outcome == "failed":
            self.failures.append(line)

    def redraw(self, running: list[tuple[Run, str]]) -> None:
        """Redraw the table: the last line of the log of each (run, its time or state)."""
        if self.console.is_terminal:
            title = self.summary(len(running))
            table = Table(box=None, show_header=False, title=title, title_justify="left", expand=True)
            for options in ({}, {"justify": "right"}, {"ratio": 1}):
                table.add_column(no_wrap=True, **options)
            for run, state in running:
                table.add_row(run.name, state, last_line(run.log))
            self.show(self.live.update, table, refresh=True)

    def summary(self, running: int = 0) -> str:
        """All counts in one line."""
        counts = self.count | {"running": running, "waiting": self.total - sum(self.count.values()) - running}
        counts = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        return f"{self.total} run{'s' * (self.total > 1)}: {counts}"

    def exit_status(self) -> int:
        """Print the failures once more and the summary. 0 all finished, 1 a run failed, 130 stopped before the end."""
        for line in self.failures if self.total > 1 else []:
            self.say(line)
        self.say(self.summary())
        unfinished = self.total - self.count["finished"] - self.count["failed"]
        return 130 if unfinished else int(self.count["failed"] > 0)


def catch_stop_signals() -> list[int]:
    """A list that receives every Ctrl-C, SIGTERM and (unless under nohup) SIGHUP."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, lambda number, _frame: caught.append(number))
    return caught


# ---- This machine ----


def visible_gpus() -> list[str]:
    """Names of the GPUs that runs may use, as CUDA_VISIBLE_DEVICES takes them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    query = "nvidia-smi --query-gpu=index --format=csv,noheader"
    found = subprocess.run(query, shell=True, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []  # it complains on its standard output


def share_of_cores(cores: list[int], slot: int, workers: int) -> list[int]:
    """The cores of one of `workers` slots: neighbours, none shared unless there are more slots than cores."""
    if workers > len(cores):
        return [cores[slot % len(cores)]]
    return cores[len(cores) * slot // workers : len(cores) * (slot + 1) // workers]


def run_here(runs: list[Run], workers: int) -> int:
    """Run everything in local processes; returns the exit status.

    The first stop signal is passed on as one SIGTERM, at which a run writes its checkpoint; the second ends it at once.
    """
    stops, passed_on, report, waiting = catch_stop_signals(), 0, Report(runs), list(reversed(runs))
    cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
    running: dict[int, tuple[Run, float, subprocess.Popen]] = {}  # by slot
    with report.live:
        while running or (waiting and not stops):
            if len(stops) > passed_on:
                passed_on = len(stops)
                report.say(f"stopping after a checkpoint: {len(running)} of {len(runs)} runs; once more stops now")
                for _, _, process in running.values():
                    process.terminate()
            for slot in range(workers):
                if slot in running or not waiting or stops:
                    continue
                run, share = waiting.pop(), share_of_cores(cores, slot, workers)
                env = {"OMP_NUM_THREADS": str(len(share))}
                where = f"cores {','.join(map(str, share))}"
                if gpus:
                    env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
                    where += f", GPU {env['CUDA_VISIBLE_DEVICES']}"
                try:
                    process = start(run, env, before=partial(os.sched_setaffinity, 0, share))
                except OSError as error:
                    report.ended(run, "failed", f"{error.filename}: {error.strerror}")
                    continue
                running[slot] = (run, time.time(), process)
                report.say(f"started   {run.name} ({where}, log {run.log})")
            for slot, (run, _, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode == 0:
                    report.ended(run, "finished")
                elif stops and process.returncode in STOPPED:
                    report.ended(run, "stopped")
                else:
                    report.ended(run, "failed", f"exit status {process.returncode}: {last_line(run.log)}")
            report.redraw([(run, str(timedelta(seconds=int(time.time() - t)))) for run, t, _ in running.values()])
            time.sleep(0.2)
    return report.exit_status()


# ---- SLURM ----


class SlurmRun:
    """A run inside a SLURM job.

    Before a time limit or a preemption submitit gets SIGUSR2, calls `checkpoint` and puts the job back into the queue.
    `scontrol requeue` and some preemptions send SIGTERM to every process of the job, and SLURM requeues it by itself.
    Either way the job starts again with this same object, and finds the checkpoint.
    """

    def __init__(self, run: Run):
        self.run = run
        self.process: subprocess.Popen | None = None

    def __call__(self) -> None:
        # SLURM also sends SIGUSR2 to the training process, which would die of it.
        ignore_user_signal = partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
        threads = {"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1")}
        self.process, status = start(self.run, threads, before=ignore_user_signal), 0
        with contextlib.suppress(subprocess.CalledProcessError):  # submitit could not requeue it: SLURM has
            status = self.wait()
        if status:
            raise RuntimeError(f"{self.run.name}: exit status {status}: {last_line(self.run.log)}")

    def wait(self) -> int:
        """The exit status; unlike Popen.wait this may be entered again by a signal handler that interrupted it."""
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return self.process.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the run with a checkpoint; what is returned runs when the job starts again."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a second warning must not end the run while it saves
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # it had ended by itself, which terminate() took note of
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(SlurmRun(self.run))


def submit_to_slurm(runs: list[Run], args: Args) -> None:
    """Submit everything as one job array; exit status 2 if SLURM refuses it."""
    if not shutil.which("srun"):
        fail(f"--slurm-partition {args.slurm_partition}: there is no SLURM on this machine")
    executor = submitit.SlurmExecutor("runs/slurm/%j", max_num_timeout=1000)
    executor.update_parameters(
        job_name="benchmark",
        partition=args.slurm_partition,
        time=args.slurm_minutes,
        cpus_per_task=args.slurm_cpus,
        gpus_per_node=args.slurm_gpus or None,
        array_parallelism=args.workers,
        additional_parameters={"requeue": True} | args.slurm_options,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # sbatch's words are in the error too
            jobs = [executor.submit(SlurmRun(run)) for run in runs]
    except OSError as error:
        fail(f"cannot write to runs/slurm: {error.strerror}")
    except submitit.core.utils.FailedJobError as error:
        fail((str(error).strip().splitlines() or ["sbatch refused the jobs"])[-1])
    for job, run in zip(jobs, runs, strict=True):
        print(f"submitted {run.name} (job {job.job_id}, log {run.log})")
    print("to watch the jobs: squeue --me; to stop them: scancel " + jobs[0].job_id.split("_")[0])


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = tyro.cli(Args, description=__doc__, args=words[:end])
    runs = make_runs(args, words[end + 1 :])
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
        for run in runs:
            print(shlex.join(run.full_command()))
        return
    if args.slurm_partition:
        submit_to_slurm(runs, args)
    else:
        sys.exit(run_here(runs, args.workers))


if __name__ == "__main__":
    main()
