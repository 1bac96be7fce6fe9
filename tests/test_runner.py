"""The benchmark's runner: real training runs where that matters, one-line commands where only its logic does."""

import fcntl
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
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, SND, STARTED
from run import Run, SlurmRun, share_of_cores
from running import BATCH, PATIENCE, TINY, assert_whole_curve, read_checkpoint, wait_until

TRAIN = f"python {ROOT / SND}.py"
BASH_RUNNERS = sorted((ROOT / "benchmark").glob("*.sh"))


def words(*arguments: str, script: Path = ROOT / "benchmark/run.py") -> list[str]:
    """A command line of the runner."""
    return [sys.executable, str(script), *arguments]


def run(cwd: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run the runner to its end in a folder of its own."""
    return subprocess.run(
        words(*arguments), cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=PATIENCE
    )


def lines_of(cwd: Path, name: str) -> list[str]:
    """The log of a run."""
    return (cwd / f"runs/{name}.log").read_text().splitlines()


def python(code: str) -> str:
    """A command that runs `code`; sys.argv[1:] are the flags that the runner adds."""
    return f"python -c {code!r}"


def start(cwd: Path, *arguments: str) -> subprocess.Popen:
    """Start the runner in a process group of its own, open to SIGHUP also where the tests run under nohup."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    hang_up = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    STARTED.append(subprocess.Popen(words(*arguments), cwd=cwd, start_new_session=True, preexec_fn=hang_up, **pipes))
    return STARTED[-1]


# ---- What is run ----------------------------------------------------------------------------------------------------


def test_runs_are_commands_times_games_times_seeds(tmp_path: Path) -> None:
    """Each combination once, first seeds first, with its own --run-name; nothing is started."""
    commands = ["a", "prog --x 1", "b", "prog 'two words'"]
    result = run(
        tmp_path,
        *("--commands", *commands, "--env-ids", "VentureNoFrameskip-v4", "ALE/Pitfall-v5", "--num-seeds", "2"),
        *("--start-seed", "4", "--total-timesteps", "99", "--dry-run", "--", "--num-envs", "8"),
    )
    expected = [
        f"{command} --run-name {name}/{game}/seed_{seed} --env-id {env_id} --seed {seed} --total-timesteps 99"
        " --num-envs 8"
        for seed in (4, 5)
        for name, command in zip(commands[::2], commands[1::2], strict=True)
        for env_id, game in (("VentureNoFrameskip-v4", "Venture"), ("ALE/Pitfall-v5", "Pitfall"))
    ]
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (0, expected, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--commands", "a", "python 'x", "--env-ids", "Pitfall-v5"], "No closing quotation"),
        (["--commands", "a", "", "--env-ids", "Pitfall-v5"], "the command is empty"),
        (["--commands", "../a", "x", "--env-ids", "Pitfall-v5"], "'../a'"),
        (["--commands", "_a", "x", "--env-ids", "Pitfall-v5"], "'_a'"),
        (["--commands", "a", "x", "--env-ids", "../Pitfall-v5"], "'../Pitfall-v5'"),
        (["--commands", "a", "x", "--env-ids", "Pitfall-v5", "ALE/Pitfall-v5"], "Pitfall is given twice"),
        (["--commands", "a", "x", "a", "y", "--env-ids", "Pitfall-v5"], "a in Pitfall is given twice"),
        (["--commands", "a", "x", "--env-ids", "Pitfall-v5", "--workers", "0"], "--workers 0"),
        (["--commands", "a", "x", "--env-ids", "Pitfall-v5", "--num-seeds", "-1"], "--num-seeds -1"),
        (["--commands", "a", "x", "--env-ids"], "--env-ids"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Exit status 2, and no folder is made."""
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


# The source's rows and our choices for them, as flags beside --model.
NO_REWARD = "C --ext-coef 0 --num-envs 32 --episodic-life --repeat-action-probability 0"
TUNED = f"{NO_REWARD} --int-episodic --actor-hidden-gain 1.414"
FIVE_WITHOUT_REWARD = {
    "ppo_rnd_without_reward": NO_REWARD,
    "ppo_snd_without_reward": NO_REWARD,
    "ppo_rnd_tuned_without_reward": f"{TUNED} --norm-obs mean-std",
    "ppo_snd_tuned_without_reward": TUNED,
    "ppo_snd_entropy_tuned_without_reward": TUNED,
}
THREE = {"ppo_rnd_c0": "C", "ppo_snd_c4": "C --int-reward-scale 0.5", "ppo_snd_entropy_c0": "C"}
ROWS = {
    "montezuma_rnd": {
        "ppo_rnd_a0": "A",
        "ppo_rnd_b0": "B",
        "ppo_rnd_b1": "B --critic-hidden-gain 1.41421356",
        "ppo_rnd_b2": "B --norm-int-reward",
        "ppo_rnd_b3": "B --norm-int-reward --critic-hidden-gain 1.41421356",
        "ppo_rnd_c0": "C",
        "ppo_rnd_c1": "C --critic-hidden-gain 1.41421356",
        "ppo_rnd_d0": "D",
    },
    "montezuma_snd": {
        f"ppo_snd_{row}": f"C --int-reward-scale {s}" for row, s in (("c0", 0.25), ("c3", 0.4), ("c4", 0.5))
    },
    "montezuma_snd_entropy": {"ppo_snd_entropy_c0": "C"},
    "breakout_without_reward": FIVE_WITHOUT_REWARD,
    "pacman_without_reward": FIVE_WITHOUT_REWARD,
} | dict.fromkeys(["montezuma", "gravitar", "venture", "pitfall", "private_eye", "solaris"], THREE)
GAME_OF = {"pacman": "MsPacman", "montezuma": "MontezumaRevenge", "private": "PrivateEye"}


@pytest.mark.parametrize("path", BASH_RUNNERS, ids=lambda path: path.stem)
def test_bash_runner(path: Path, tmp_path: Path) -> None:
    """Each prints the source's rows from any folder, and heeds SEEDS, TOTAL_TIMESTEPS and flags of both kinds."""
    env = os.environ | {"SEEDS": "2", "TOTAL_TIMESTEPS": "5000"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", str(path), "--start-seed", "3", "--dry-run", "--", "--int-coef", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE)
    game = path.stem.split("_")[0]
    game = GAME_OF.get(game, game.capitalize())
    expected = []
    for seed in (3, 4):
        for name, flags in ROWS[path.stem].items():
            script = next(script for script in reversed(SCRIPTS) if name.startswith(script.removesuffix("_atari")))
            flags += f" --run-name {name}/{game}/seed_{seed} --env-id {game}NoFrameskip-v4 --seed {seed}"
            expected.append(f"python {script}.py --model {flags} --total-timesteps 5000 --int-coef 2")
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (0, expected, "")


def test_bash_runners_cover_the_source() -> None:
    """No row without a file and no file without a test."""
    assert {path.stem for path in BASH_RUNNERS} == set(ROWS)


def test_bash_runner_trains(tmp_path: Path) -> None:
    """A copy of the project in another folder runs its benchmark as it is, here with a tiny budget."""
    for name in [f"{script}.py" for script in SCRIPTS] + ["models.py"]:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("__pycache__"))
    env = os.environ | {"SEEDS": "1", "TOTAL_TIMESTEPS": str(2 * BATCH), "WORKERS": "2"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", "../benchmark/breakout_without_reward.sh", "--", *TINY]
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in FIVE_WITHOUT_REWARD:
        saved = read_checkpoint(tmp_path / f"runs/{name}/Breakout/seed_1")["args"]
        assert (saved["ext_coef"], saved["episodic_life"], saved["repeat_action_probability"]) == (0, True, 0)
        assert (saved["num_envs"], saved["env_id"], saved["seed"]) == (4, "BreakoutNoFrameskip-v4", 1)


# ---- Outcomes -------------------------------------------------------------------------------------------------------


def test_failures_are_reported(tmp_path: Path) -> None:
    """Exit status 1 with the last line of each failed run's log; the other runs are not disturbed."""
    commands = ["good", python("print(1)"), "bad", python("print(2); raise ValueError(345)"), "none", "no-such-program"]
    result = run(tmp_path, "--commands", *commands, "--env-ids", "Pitfall-v5", "--num-seeds", "1")
    assert result.returncode == 1
    assert "finished  good/Pitfall/seed_1\n" in result.stdout
    assert (
        "failed    bad/Pitfall/seed_1: exit status 1: ValueError: 345 (log runs/bad/Pitfall/seed_1.log)"
        in result.stdout
    )
    assert "failed    none/Pitfall/seed_1: no-such-program: No such file or directory" in result.stdout
    assert result.stdout.splitlines()[-1] == "3 runs: 1 finished, 2 failed"
    assert lines_of(tmp_path, "good/Pitfall/seed_1")[1:] == ["1"]


def test_finished_runs_are_skipped_and_a_larger_budget_goes_on(tmp_path: Path) -> None:
    """The training script itself says what is finished; a killed run's checkpoint is resumed."""
    arguments = ["--commands", "m", TRAIN, "--env-ids", "PitfallNoFrameskip-v4", "--num-seeds", "1"]
    run_dir = tmp_path / "runs/m/Pitfall/seed_1"
    outcomes = []
    for iterations in (2, 2, 4):
        result = run(tmp_path, *arguments, "--total-timesteps", str(iterations * BATCH), "--", *TINY)
        assert result.returncode == 0, result.stdout + result.stderr
        outcomes.append(result.stdout.splitlines()[-1])
    assert outcomes == ["1 run: 1 finished", "1 run: 1 skipped", "1 run: 1 finished"]
    assert read_checkpoint(run_dir)["counters"]["iteration"] == 4
    assert_whole_curve(run_dir, 4)
    assert sum(line.startswith("$ ") for line in lines_of(tmp_path, "m/Pitfall/seed_1")) == 3  # one log of all starts
    changed = run(tmp_path, *arguments, "--total-timesteps", str(4 * BATCH), "--", *TINY, "--gamma", "0.9")
    assert changed.returncode == 1  # a run is never continued under other settings
    assert "--gamma 0.9 contradicts the saved 0.998" in changed.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_and_resume(tmp_path: Path, number: int) -> None:
    """One signal: the run saves a checkpoint, the waiting run is not started, exit 130; the same line goes on."""
    arguments = ["--commands", "m", TRAIN, "--env-ids", "PitfallNoFrameskip-v4", "--num-seeds", "2"]
    run_dir = tmp_path / "runs/m/Pitfall/seed_1"
    log = tmp_path / "runs/m/Pitfall/seed_1.log"
    process = start(tmp_path, *arguments, "--", *TINY)
    wait_until(lambda: log.exists() and "steps/s" in log.read_text(), process)
    os.killpg(process.pid, number)  # as a terminal does: to the whole foreground group
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, out
    assert out.splitlines()[-1] == "2 runs: 1 stopped, 1 waiting"
    assert "stopped at step" in log.read_text().splitlines()[-1]
    saved = read_checkpoint(run_dir)["counters"]["iteration"]
    assert saved > 0
    assert not (tmp_path / "runs/m/Pitfall/seed_2").exists()
    dry = run(tmp_path, *arguments, "--dry-run", "--", *TINY).stdout.splitlines()
    assert [" --resume runs/m/Pitfall/seed_1" in line for line in dry] == [True, False]


def test_a_dry_run_may_be_cut_short(tmp_path: Path) -> None:
    """As by `| head`, which closes the pipe."""
    command = words("--commands", "a", "true", "--env-ids", "Pitfall-v5", "--num-seeds", "20000", "--dry-run")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"Pitfall" in process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(PATIENCE)) == (b"", -signal.SIGPIPE)


@pytest.mark.parametrize("loss", ["hangup", "broken pipe"])
def test_runs_are_not_lost_with_the_screen(tmp_path: Path, loss: str) -> None:
    """A closed terminal, which shows the live table before, stops them as SIGTERM does; a closed pipe disturbs none."""
    waits = "import signal, time; signal.signal(15, lambda *_: (print('saved', flush=True), exit(143)));"
    waits += f"print('ready', flush=True); time.sleep({60 if loss == 'hangup' else 3})"
    command = words("--commands", "m", python(waits), "--env-ids", "Pitfall-v5", "--num-seeds", "2")
    ours, theirs = pty.openpty() if loss == "hangup" else os.pipe()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        if loss == "hangup":
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    options = dict(start_new_session=True, preexec_fn=take_terminal, stdout=theirs)
    STARTED.append(subprocess.Popen(command, cwd=tmp_path, **options))
    process, log = STARTED[-1], tmp_path / "runs/m/Pitfall/seed_1.log"
    os.close(theirs)
    wait_until(lambda: log.exists() and log.read_text().splitlines()[1:] == ["ready"], process)
    if loss == "hangup":
        screen = ""
        while "running" not in screen or "ready" not in screen:
            screen += os.read(ours, 4096).decode(errors="replace")
        assert "1 running, 1 waiting" in screen
    os.close(ours)
    assert process.wait(PATIENCE) == (130 if loss == "hangup" else 0)
    assert log.read_text().splitlines()[2:] == (["saved"] if loss == "hangup" else [])
    assert (tmp_path / "runs/m/Pitfall/seed_2.log").exists() == (loss != "hangup")


def test_second_signal_ends_a_run_that_does_not_stop(tmp_path: Path) -> None:
    """The first SIGTERM is passed on exactly once; the second goes to the run as well."""
    stubborn = (
        "import signal, time; count = [];"
        "signal.signal(15, lambda *_: (count.append(1), print(len(count), flush=True), len(count) == 2 and exit(143)));"
        "print(0, flush=True); [time.sleep(0.1) for _ in range(2000)]"
    )
    log = tmp_path / "runs/m/Pitfall/seed_1.log"
    process = start(tmp_path, "--commands", "m", python(stubborn), "--env-ids", "Pitfall-v5", "--num-seeds", "1")
    wait_until(lambda: log.exists() and log.read_text().splitlines()[1:] == ["0"], process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: log.read_text().splitlines()[1:] == ["0", "1"], process)
    time.sleep(1)  # many rounds of the runner's loop
    assert log.read_text().splitlines()[1:] == ["0", "1"]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out.splitlines()[-1]) == (130, "1 run: 1 stopped")


# ---- Sharing the machine --------------------------------------------------------------------------------------------


def test_gpus_and_cores_are_shared_out(tmp_path: Path) -> None:
    """Four runs at once, each waiting for the others: GPUs in turn, no core twice while there are enough."""
    code = (
        "import os, time, pathlib; here = pathlib.Path('here'); here.mkdir(exist_ok=True);"
        "(here / str(os.getpid())).touch();"
        "t = time.time();"
        "[time.sleep(0.05) for _ in iter(lambda: len(list(here.iterdir())) < 4 and time.time() < t + 60, False)];"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], *sorted(os.sched_getaffinity(0)))"
    )
    result = run(
        tmp_path,
        *("--commands", "m", python(code), "--env-ids", "Pitfall-v5", "--num-seeds", "4", "--workers", "4"),
        CUDA_VISIBLE_DEVICES="5,7",
    )
    assert result.returncode == 0, result.stdout
    assert len(list((tmp_path / "here").iterdir())) == 4
    shares = [lines_of(tmp_path, f"m/Pitfall/seed_{seed}")[1].split() for seed in (1, 2, 3, 4)]
    assert [share[0] for share in shares] == ["5", "7", "5", "7"]
    cores = [list(map(int, share[2:])) for share in shares]
    assert [int(share[1]) for share in shares] == list(map(len, cores))
    ours = sorted(os.sched_getaffinity(0))
    if len(ours) >= 4:
        assert sorted(itertools.chain(*cores)) == ours
    else:
        assert cores == [[ours[i % len(ours)]] for i in range(4)]


@pytest.mark.parametrize(("count", "workers"), [(16, 3), (16, 16), (8, 4), (5, 2), (2, 1)])
def test_share_of_cores(count: int, workers: int) -> None:
    """All cores are used, none twice, and shares differ by one core at most."""
    cores = list(range(10, 10 + count))
    shares = [share_of_cores(cores, slot, workers) for slot in range(workers)]
    assert list(itertools.chain(*shares)) == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- SLURM ----------------------------------------------------------------------------------------------------------

SLURM_PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel"]
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=test Nodes=ALL Default=YES State=UP
"""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real SLURM of one node on this machine: its own munge, controller and node daemon, ended afterwards."""
    missing = [program for program in SLURM_PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("SLURM's daemons need root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    settings = dict(host=host, folder=folder, port=free_port(), node_port=free_port(), cores=os.cpu_count())
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**settings))
    files = [
        f"--{what}={folder}/munge.{what.split('-')[0]}" for what in ("key-file", "socket", "log-file", "seed-file")
    ]
    commands = [
        ["munged", "--foreground", "--force", *files, f"--pid-file={folder}/munge.pid"],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    ]
    daemons = []
    with pytest.MonkeyPatch.context() as patch, open(folder / "output", "w") as output:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output))
                time.sleep(1)
            deadline = time.monotonic() + 60
            while b"idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True).stdout:
                if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
                    pytest.fail("SLURM did not start:\n" + (folder / "output").read_text())
                time.sleep(0.5)
            yield
        finally:
            subprocess.run(["scancel", "--user=root"], capture_output=True)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and subprocess.run(["squeue", "--noheader"], capture_output=True).stdout:
                time.sleep(0.5)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(timeout=60)


def jobs_in_state(state: str) -> list[str]:
    """Ids of the jobs in a state, for instance RUNNING."""
    command = ["squeue", "--noheader", "--array", f"--states={state}", "--format=%i"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


SLURM_FLAGS = ["--slurm-partition", "test", "--slurm-gpus", "0", "--slurm-cpus", "1", "--slurm-minutes", "30"]


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("way", ["scontrol requeue", "scancel --signal=USR2"])
def test_preempted_job_resumes(tmp_path: Path, way: str) -> None:
    """A job that SLURM requeues, or that gets submitit's signal for preemption, saves, waits, resumes and finishes."""
    iterations = 30
    log, run_dir = tmp_path / "runs/m/Pitfall/seed_1.log", tmp_path / "runs/m/Pitfall/seed_1"
    arguments = ["--commands", "m", TRAIN, "--env-ids", "PitfallNoFrameskip-v4", "--num-seeds", "1", *SLURM_FLAGS]
    process = start(tmp_path, *arguments, "--total-timesteps", str(iterations * BATCH), "--", *TINY)
    wait_until(lambda: log.exists() and "steps/s" in log.read_text(), process)
    (job,) = jobs_in_state("RUNNING")
    subprocess.run([*way.split(), job], check=True)
    wait_until(lambda: jobs_in_state("PENDING") == [job], process)
    stopped = re.search(r"stopped at step ([\d,]+);", log.read_text())
    assert stopped, log.read_text()
    saved = read_checkpoint(run_dir)["counters"]["iteration"]
    assert saved == int(stopped[1].replace(",", "")) // BATCH < iterations
    # By itself SLURM waits two minutes. Not StartTime=now: the node counts whole seconds, and refuses to start a job in
    # the second in which it ended it ("Job credential revoked"); the job then counts as failed.
    subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now+2"], check=True)
    out, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, out + log.read_text()
    assert out.splitlines()[-1] == "1 run: 1 finished"
    starts = [line for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert ["--resume runs/m/Pitfall/seed_1" in line for line in starts] == [False, True]
    assert read_checkpoint(run_dir)["counters"]["iteration"] == iterations
    assert_whole_curve(run_dir, iterations)


def test_what_sbatch_is_asked_for(tmp_path: Path) -> None:
    """Every option stands in the file that it gets; here it is a program that refuses everything."""
    for program in ("sbatch", "srun"):
        (tmp_path / program).symlink_to(shutil.which("false"))
    flags = ["--slurm-minutes", "77", "--slurm-cpus", "5", "--slurm-gpus", "2", "--slurm-partition", "p"]
    flags += ["--workers", "3", "--slurm-options", "account", "my-group", "mem", "64G"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run(tmp_path, "--commands", "a", "x", "--env-ids", "Pitfall-v5", "--num-seeds", "4", *flags, PATH=path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    (file,) = (tmp_path / "runs/slurm").glob("*.sh")
    wanted = {"account=my-group", "array=0-3%3", "cpus-per-task=5", "gpus-per-node=2", "mem=64G", "partition=p"}
    assert wanted | {"requeue", "time=77"} <= {line.removeprefix("#SBATCH --") for line in file.read_text().split("\n")}


def test_threads_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as SLURM gave it cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    SlurmRun(Run("m", [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]))()
    assert lines_of(tmp_path, "m")[1:] == ["3"]


@pytest.fixture
def user_signal() -> Iterator[None]:
    """Puts back what this process did on SIGUSR2."""
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.usefixtures("user_signal")
def test_warning_after_the_end_of_a_run() -> None:
    """A run that ends just before submitit asks for its checkpoint is put back into the queue like any other."""
    job = SlurmRun(Run("m/Pitfall/seed_1", ["true"]))
    job.process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOWAIT)
    assert job.checkpoint().function.run == job.run


SAVES_FOR_A_SECOND = """
import signal, sys, time

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # like a training script, which a second signal ends at once
    time.sleep(1)
    sys.exit(7)

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("user_signal")
def test_second_warning_lets_a_run_save() -> None:
    """SLURM may warn again while the run is still writing its checkpoint."""
    job = SlurmRun(Run("m/Pitfall/seed_1", ["true"]))
    job.process = subprocess.Popen([sys.executable, "-c", SAVES_FOR_A_SECOND], stdout=subprocess.PIPE)
    job.process.stdout.readline()
    signal.signal(signal.SIGUSR2, lambda *_: job.checkpoint())
    second = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
    second.start()
    os.kill(os.getpid(), signal.SIGUSR2)
    second.join()
    assert job.process.wait() == 7


@pytest.mark.usefixtures("slurm")
def test_array_keeps_its_limit_and_outlives_the_watch(tmp_path: Path) -> None:
    """One job at a time though there is room for more, sbatch's options arrive, Ctrl-C leaves the jobs alone."""
    flags = ["--num-seeds", "3", "--workers", "1", "--slurm-options", "comment", "mine", *SLURM_FLAGS]
    process = start(
        tmp_path, "--commands", "m", python("import time; time.sleep(600)"), "--env-ids", "Pitfall-v5", *flags
    )
    log = tmp_path / "runs/m/Pitfall/seed_1.log"
    try:
        wait_until(log.exists, process)  # SLURM has looked at the array, and has started what it may
        jobs = jobs_in_state("RUNNING") + jobs_in_state("PENDING")
        assert [len(jobs_in_state(state)) for state in ("RUNNING", "PENDING")] == [1, 2]
        comments = ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%k"]
        assert subprocess.run(comments, capture_output=True, text=True).stdout.split() == ["mine"] * 3
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert set(re.search("scancel (.*)", out)[1].split()) == set(jobs) == set(jobs_in_state("RUNNING,PENDING"))
    finally:
        subprocess.run(["scancel", "--user=root"], check=True)


@pytest.mark.usefixtures("slurm")
def test_failed_job_is_reported(tmp_path: Path) -> None:
    """Of an array of two jobs one fails: exit status 1 and the last line of its log."""
    commands = ["good", python("print(1)"), "bad", python("raise ValueError(345)")]
    result = run(tmp_path, "--commands", *commands, "--env-ids", "Pitfall-v5", "--num-seeds", "1", *SLURM_FLAGS)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "finished  good/Pitfall/seed_1\n" in result.stdout
    assert "failed    bad/Pitfall/seed_1: ValueError: 345" in result.stdout
    assert lines_of(tmp_path, "good/Pitfall/seed_1")[1:] == ["1"]


@pytest.mark.usefixtures("slurm")
def test_unknown_partition_is_one_line(tmp_path: Path) -> None:
    """What sbatch says, exit status 2."""
    flags = ["--slurm-partition", "nowhere", "--slurm-gpus", "0"]
    result = run(tmp_path, "--commands", "a", "x", "--env-ids", "Pitfall-v5", "--num-seeds", "1", *flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "Invalid partition name" in result.stderr
