"""The benchmark's runner: real training runs where that matters, one-line commands where only its logic does."""

import fcntl
import importlib
import itertools
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, SND
from run import Run, SlurmRun, share_of_cores
from running import BATCH, PATIENCE, TINY, assert_whole_curve, finish, read_checkpoint, read_terminal, start, wait_until

RUNNER = [sys.executable, str(ROOT / "benchmark/run.py")]
ONE = ["--env-ids", "PitfallNoFrameskip-v4", "--num-seeds", "1"]
# One thread, for cores that other tests share.
TRAIN = ["--commands", "m", f"env OMP_NUM_THREADS=1 {sys.executable} {ROOT / SND}.py", *ONE]
RUN_DIR, LOG = Path("runs/m/Pitfall/seed_1"), Path("runs/m/Pitfall/seed_1.log")


def run(cwd: Path, *arguments: str, command: list[str] | None = None, **env: str) -> subprocess.CompletedProcess:
    """Run the runner (or another command) to its end in a folder of its own."""
    options = dict(cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=2 * PATIENCE)
    return subprocess.run(command or [*RUNNER, *arguments], **options)


def lines_of(log: Path) -> list[str]:
    """The lines of a log below the command; [] until it is there."""
    return log.read_text().splitlines()[1:] if log.exists() else []


def python(code: str) -> str:
    """A command that runs `code`; sys.argv[1:] are the flags that the runner adds."""
    return f"python -c {code!r}"


# ---- What is run ----


def test_runs_are_commands_times_games_times_seeds(tmp_path: Path):
    flags = ["--num-seeds", "2", "--start-seed", "4", "--total-timesteps", "99", "--dry-run", "--", "--num-envs", "8"]
    games = ["VentureNoFrameskip-v4", "ALE/Pitfall-v5"]
    result = run(tmp_path, "--commands", "a", "prog --x 1", "b", "prog 'two words'", "--env-ids", *games, *flags)
    expected = [
        f"{command} --run-name {name}/{game}/seed_{seed} --env-id {env_id} --seed {seed} --total-timesteps 99"
        " --num-envs 8"
        for seed in (4, 5)
        for name, command in (("a", "prog --x 1"), ("b", "prog 'two words'"))
        for env_id, game in zip(games, ("Venture", "Pitfall"), strict=True)
    ]
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (0, expected, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("commands", "games", "message"),
    [
        (["a", "python 'x"], ["Pitfall-v5"], "No closing quotation"),
        (["../a", "x"], ["Pitfall-v5"], "'../a'"),
        (["a", "x"], ["Pitfall-v5", "ALE/Pitfall-v5"], "a in Pitfall is given twice"),
        (["a", "x"], ["Pitfall-v5", "--workers", "0"], "--workers 0"),
        (["a", "x"], [], "--env-ids"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, commands: list[str], games: list[str], message: str):
    result = run(tmp_path, "--commands", *commands, "--env-ids", *games)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


GAIN, TUNED = "--critic-hidden-gain 1.41421356", "--int-episodic --actor-hidden-gain 1.414"
NO_REWARD = "C --ext-coef 0 --num-envs 32 --episodic-life --repeat-action-probability 0"
METHODS = f"""
rnd_a0 A
rnd_b0 B
rnd_b1 B {GAIN}
rnd_b2 B --norm-int-reward
rnd_b3 B --norm-int-reward {GAIN}
rnd_c0 C
rnd_c1 C {GAIN}
rnd_d0 D
snd_c0 C --int-reward-scale 0.25
snd_c3 C --int-reward-scale 0.4
snd_c4 C --int-reward-scale 0.5
snd_entropy_c0 C
rnd_without_reward {NO_REWARD}
snd_without_reward {NO_REWARD}
rnd_tuned_without_reward {NO_REWARD} {TUNED} --norm-obs mean-std
snd_tuned_without_reward {NO_REWARD} {TUNED}
snd_entropy_tuned_without_reward {NO_REWARD} {TUNED}
"""
# The source's rows and our choices for them, as flags beside --model; and which of them a file runs.
METHODS = dict(line.split(" ", 1) for line in METHODS.strip().split("\n"))
ROWS = dict.fromkeys(["gravitar", "venture", "pitfall", "private_eye", "solaris"], "rnd_c0|snd_c4|snd_entropy_c0")
ROWS |= dict(montezuma=ROWS["pitfall"], montezuma_rnd="rnd_[a-d].", montezuma_snd="snd_c.")
ROWS |= dict(montezuma_snd_entropy="snd_entropy_c0", breakout_without_reward=".*_reward")
ROWS |= dict(pacman_without_reward=".*_reward")
GAME_OF = {"pacman": "MsPacman", "montezuma": "MontezumaRevenge", "private": "PrivateEye"}
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmark/*.sh")), ids=lambda path: path.stem)
def test_bash_runner(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each prints the source's rows, which its scripts accept, and heeds SEEDS, TOTAL_TIMESTEPS and flags."""
    command = ["bash", str(path), "--start-seed", "3", "--dry-run", "--", "--int-coef", "2"]
    result = run(tmp_path, command=command, SEEDS="2", TOTAL_TIMESTEPS="50000", PATH=PATH)
    game = path.stem.split("_")[0]
    game, expected = GAME_OF.get(game, game.capitalize()), []
    for seed, method in itertools.product((3, 4), (row for row in METHODS if re.fullmatch(ROWS[path.stem], row))):
        script = next(script for script in reversed(SCRIPTS) if f"ppo_{method}".startswith(script[: -len("_atari")]))
        flags = f"--run-name ppo_{method}/{game}/seed_{seed} --env-id {game}NoFrameskip-v4 --seed {seed}"
        flags = f"--model {METHODS[method]} {flags} --total-timesteps 50000 --int-coef 2"
        expected.append(f"python {script}.py {flags}")
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        assert importlib.import_module(script).parse_args()[0].int_coef == 2
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (0, expected, "")


# ---- Outcomes ----


def test_failures_are_reported(tmp_path: Path):
    commands = ["good", python("print(1)"), "bad", python("raise ValueError(345)"), "none", "no-such-program"]
    result = run(tmp_path, "--commands", *commands, *ONE)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "finished  good/Pitfall/seed_1\n" in result.stdout
    why = "exit status 1: ValueError: 345 (log runs/bad/Pitfall/seed_1.log)\n"
    assert f"failed    bad/Pitfall/seed_1: {why}" in result.stdout
    assert re.search("failed    none/Pitfall/seed_1: .*no-such-program", result.stdout)
    assert result.stdout.splitlines()[-1] == "3 runs: 1 finished, 2 failed"
    assert lines_of(tmp_path / "runs/good/Pitfall/seed_1.log") == ["1"]


def test_finished_runs_stay_and_a_larger_budget_goes_on(tmp_path: Path):
    outcomes = []
    for iterations, more in ((2, ["--ent-coef", "0.1"]), (2, []), (4, ["--gamma", "0.9"])):
        result = run(tmp_path, *TRAIN, "--total-timesteps", str(iterations * BATCH), "--", *TINY, *more)
        assert result.returncode == 0, result.stdout + result.stderr
        outcomes.append(result.stdout.splitlines()[-1])
    assert outcomes == ["1 run: 1 finished"] * 3
    saved = read_checkpoint(tmp_path / RUN_DIR)["args"]
    assert (saved["gamma"], saved["ent_coef"]) == (0.9, 0.1)
    assert_whole_curve(tmp_path / RUN_DIR, 4)
    log = (tmp_path / LOG).read_text()  # one log of all starts
    assert log.count("$ ") == 3 and log.count("seed_1 is finished: ") == 1


def test_stop_and_resume(tmp_path: Path):
    """Ctrl-C: the run saves a checkpoint, the waiting run is not started, exit 130; the same line goes on."""
    arguments = [*TRAIN[:-1], "2"]
    process = start("benchmark/run", [*arguments, "--", *TINY], tmp_path)
    wait_until(lambda: "playing" in str(lines_of(tmp_path / LOG)), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    status, out, _ = finish(process)
    assert (status, out.splitlines()[-1]) == (130, "2 runs: 1 stopped, 1 waiting")
    assert "stopped at step" in lines_of(tmp_path / LOG)[-1]
    assert read_checkpoint(tmp_path / RUN_DIR)["counters"]["global_step"] > 0
    assert not (tmp_path / "runs/m/Pitfall/seed_2").exists()
    dry = run(tmp_path, *arguments, "--dry-run", "--", *TINY).stdout.splitlines()
    assert [f" --resume {RUN_DIR}" in line for line in dry] == [True, False]


@pytest.mark.parametrize("loss", ["hangup", "broken pipe"])
def test_runs_are_not_lost_with_the_screen(tmp_path: Path, loss: str):
    """A closed terminal, which shows the live table before, stops them as SIGTERM does; a closed pipe disturbs none."""
    hangup = loss == "hangup"
    waits = "import signal, time; signal.signal(15, lambda *_: (print('saved', flush=True), exit(143)));"
    waits += f"print('ready', flush=True); time.sleep({60 if hangup else 1})"
    ours, theirs = pty.openpty() if hangup else os.pipe()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        if hangup:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    arguments = ["--commands", "m", python(waits), *ONE[:-1], "2"]
    process = start("benchmark/run", arguments, tmp_path, preexec_fn=take_terminal, stdout=theirs, stderr=None)
    os.close(theirs)
    wait_until(lambda: lines_of(tmp_path / LOG) == ["ready"], process)
    if hangup:
        read_terminal(ours, "1 running, 1 waiting.*ready")
    os.close(ours)
    assert process.wait(PATIENCE) == (130 if hangup else 0)
    assert lines_of(tmp_path / LOG)[1:] == (["saved"] if hangup else [])
    assert (tmp_path / "runs/m/Pitfall/seed_2.log").exists() == (not hangup)


def test_second_signal_ends_a_run_that_does_not_stop(tmp_path: Path):
    """The first SIGTERM is passed on exactly once; the second signal goes to the run as well."""
    handler = "lambda *_: print(n := next(i), flush=True) or n == 2 and exit(143)"
    stubborn = (
        f"import signal, time; i = iter((1, 2)); signal.signal(15, {handler}); print(0, flush=True); time.sleep(99)"
    )
    process = start("benchmark/run", ["--commands", "m", python(stubborn), *ONE], tmp_path)
    wait_until(lambda: lines_of(tmp_path / LOG) == ["0"], process)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: lines_of(tmp_path / LOG) == ["0", "1"], process)
    time.sleep(1)  # many rounds of the runner's loop
    assert lines_of(tmp_path / LOG) == ["0", "1"]
    process.send_signal(signal.SIGINT)
    status, out, _ = finish(process)
    assert (status, out.splitlines()[-1]) == (130, "1 run: 1 stopped")


# ---- Sharing the machine ----


def test_gpus_and_cores_are_shared_out(tmp_path: Path):
    shown = "os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], os.sched_getaffinity(0)"
    arguments = ["--commands", "m", python(f"import os; print({shown})"), *ONE[:-1], "4", "--workers", "4"]
    assert run(tmp_path, *arguments, CUDA_VISIBLE_DEVICES="5,7").returncode == 0
    for slot, gpu in enumerate("5757"):
        cores = share_of_cores(sorted(os.sched_getaffinity(0)), slot, 4)
        assert lines_of(tmp_path / f"runs/m/Pitfall/seed_{slot + 1}.log") == [f"{gpu} {len(cores)} { {*cores} }"]


@pytest.mark.parametrize(("count", "workers"), [(16, 3), (16, 16), (5, 2), (2, 1)])
def test_share_of_cores(count: int, workers: int):
    shares = [share_of_cores(list(range(10, 10 + count)), slot, workers) for slot in range(workers)]
    assert list(itertools.chain(*shares)) == list(range(10, 10 + count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- SLURM ----

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=test Nodes=ALL Default=YES State=UP
"""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def slurm_daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real SLURM of one node on this machine: its own munge, controller and node daemon, ended afterwards."""
    if os.geteuid() or not (shutil.which("slurmctld") and shutil.which("munged")):
        pytest.skip("needs root and SLURM: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    settings = dict(host=host, folder=folder, port=free_port(), node_port=free_port(), cores=os.cpu_count())
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**settings))
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"--{what}-file={folder}/munge.{what}" for what in ("key", "log", "seed", "pid")]
    daemons = []
    with pytest.MonkeyPatch.context() as patch, open(folder / "output", "w") as output:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output))
                time.sleep(1)
            wait_until(lambda: "idle" in printed("sinfo", "-h", "-o", "%T"), daemons[-1])
            yield
        finally:
            printed("scancel", "--user=root")
            for _ in range(120):
                time.sleep(0.5 if printed("squeue", "--noheader") else 0)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(timeout=60)


def printed(*command: str) -> str:
    """What a program of SLURM prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def jobs_in_state(state: str) -> list[str]:
    """Ids of the jobs in a state, for instance RUNNING."""
    return printed("squeue", "--noheader", "--array", f"--states={state}", "--format=%i").split()


SLURM_FLAGS = ["--slurm-partition", "test", "--slurm-gpus", "0", "--slurm-cpus", "1", "--slurm-minutes", "30"]


@pytest.mark.usefixtures("slurm_daemons")
@pytest.mark.parametrize("way", ["scontrol requeue", "scancel --signal=USR2"])
def test_preempted_job_resumes(tmp_path: Path, way: str):
    """A job that SLURM requeues, or that gets submitit's signal for preemption, saves, waits, resumes and finishes."""
    steps, log = 20 * BATCH, tmp_path / LOG
    result = run(tmp_path, *TRAIN, *SLURM_FLAGS, "--total-timesteps", str(steps), "--", *TINY)
    assert result.returncode == 0, result.stdout + result.stderr
    wait_until(lambda: "playing" in str(lines_of(log)))
    (job,) = jobs_in_state("RUNNING")
    assert f"submitted m/Pitfall/seed_1 (job {job}, log " in result.stdout
    printed(*way.split(), job)
    wait_until(lambda: jobs_in_state("PENDING") == [job])
    saved = read_checkpoint(tmp_path / RUN_DIR)["counters"]["global_step"]
    assert f"stopped at step {saved};" in log.read_text() and saved < steps
    # By itself SLURM waits two minutes. Not StartTime=now: the node counts whole seconds, and refuses to start a job in
    # the second in which it ended it ("Job credential revoked"); the job then counts as failed.
    printed("scontrol", "update", f"jobid={job}", "StartTime=now+2")
    wait_until(lambda: not jobs_in_state("PENDING,RUNNING,COMPLETING"))
    assert "finished: " in log.read_text()
    assert [f"--resume {RUN_DIR}" in line for line in re.findall(r"\$ .*", log.read_text())] == [False, True]
    assert_whole_curve(tmp_path / RUN_DIR, 20)


def test_what_sbatch_is_asked_for(tmp_path: Path):
    """Every option stands in the file that it gets; here it is a program that refuses everything, in one line."""
    for program in ("sbatch", "srun"):
        (tmp_path / program).symlink_to(shutil.which("false"))
    flags = "--slurm-minutes 77 --slurm-cpus 5 --slurm-gpus 2 --slurm-partition p --workers 3 --num-seeds 4"
    flags += " --slurm-options account my-group mem 64G"
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run(tmp_path, "--commands", "a", "x", *ONE[:2], *flags.split(), PATH=path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    (file,) = (tmp_path / "runs/slurm").glob("*.sh")
    wanted = "account=my-group array=0-3%3 cpus-per-task=5 gpus-per-node=2 mem=64G partition=p requeue time=77"
    assert {*wanted.split()} <= {line.removeprefix("#SBATCH --") for line in file.read_text().splitlines()}


def test_warnings_before_a_time_limit():
    """A run that has just ended is queued again like any other; a second warning does not disturb one that saves."""
    before, job = signal.getsignal(signal.SIGUSR2), SlurmRun(Run("m/Pitfall/seed_1", ["true"]))
    saves = "import signal, time; signal.signal(15, lambda *_: (signal.signal(15, signal.SIG_DFL), time.sleep(1),"
    saves += "exit(7))); print('ready', flush=True); time.sleep(60)"
    try:
        job.process = subprocess.Popen(["true"])
        os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOWAIT)
        assert job.checkpoint().function.run == job.run

        job.process = subprocess.Popen([sys.executable, "-c", saves], stdout=subprocess.PIPE)
        job.process.stdout.readline()
        signal.signal(signal.SIGUSR2, lambda *_: job.checkpoint())
        second = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
        second.start()
        os.kill(os.getpid(), signal.SIGUSR2)
        second.join()
        assert job.process.wait() == 7
    finally:
        signal.signal(signal.SIGUSR2, before)
