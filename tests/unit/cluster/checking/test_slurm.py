"""Mistakes planted one by one in our own sbatch file: each is found, in its line, and nothing else is."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigray.cluster.checking.kinds import Kind, check_file, kind_of
from bigray.cluster.checking.sbatch_options import megabytes_of, nodes_of, seconds_of, signal_of
from bigray.cluster.checking.slurm import check_slurm

FILE = Path(__file__).parents[4] / "cluster/slurm/bigray.sbatch"
OURS = FILE.read_text()

GPUS = ("##SBATCH --gpus-per-node=1", "#SBATCH --gpus-per-node=1")
RUN = '  run bigray "$@" || code=$?'
START = '--temp-dir="$BIGRAY_TEMP" --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}"'
GPU_PART = '--num-gpus="${SLURM_GPUS_ON_NODE:-0}"'
WORKER_PORTS = "--min-worker-port=0 --max-worker-port=0"
TASKS = "#SBATCH --ntasks-per-node=1"
SIGNAL = "#SBATCH --signal=B:TERM@120"
TOKEN_FILE = 'install -m 600 /dev/null "$RAY_AUTH_TOKEN_PATH"\n'


def _after(line: str, more: str) -> tuple[str, str]:
    return line, f"{line}\n{more}"


MISTAKES: dict[str, tuple[str, str, str | None, str]] = {
    # name: (old text, new text, a text in the line of the fault, a part of the message)
    "unknown option": ("--nodes=2", "--node=2", "--node=2", "--nodes"),
    "unknown option far off": (*_after(SIGNAL, "#SBATCH --gpu-memory=80G"), "--gpu-memory", "no such option"),
    "unknown short option": ("--nodes=2", "-X 2\n#SBATCH -N 2", "-X 2", "no such option"),
    "no dashes": ("--mem=0", "mem=0", "SBATCH mem=0", "--mem"),
    "option without value": ("--job-name=bigray", "--job-name", "--job-name", "needs a value"),
    "spaces around the equals sign": ("--nodes=2", "--nodes = 2", "--nodes =", "needs a value"),
    "flag with value": ("--requeue\n", "--requeue=yes\n", "--requeue=yes", "takes no value"),
    "empty directive": (*_after(SIGNAL, "#SBATCH"), "#SBATCH\n", "has no option"),
    "open quote": ("--job-name=bigray", '--job-name="bigray', "--job-name", "quote"),
    "option of the command line": ("--job-name=bigray", "--wrap=hostname", "--wrap", "command line"),
    "given twice": (*_after(SIGNAL, "#SBATCH --nodes=4"), "--nodes=4", " too, and the last"),
    "commented out by a space": ("#SBATCH --mem=0", "# SBATCH --mem=0", "# SBATCH --mem", "comment"),
    "lower case": ("#SBATCH --mem=0", "#sbatch --mem=0", "#sbatch", "comment"),
    "indented": ("#SBATCH --mem=0", "  #SBATCH --mem=0", "#SBATCH --mem", "comment"),
    "glued": ("#SBATCH --mem=0", "#SBATCH--mem=0", "#SBATCH--mem", "comment"),
    "after the first command": (*_after("set -euo pipefail", "#SBATCH --qos=long"), "--qos", "ignores"),
    "nodes in words": ("--nodes=2", "--nodes=two", "--nodes=two", "number of nodes"),
    "no nodes at all": ("--nodes=2", "--nodes=0", "--nodes=0", "number of nodes"),
    "nodes the wrong way round": ("--nodes=2", "--nodes=4-2", "--nodes=4-2", "number of nodes"),
    "nodes missing": ("#SBATCH --nodes=2\n", "", None, "--nodes"),
    "time with a unit": ("--time=04:00:00", "--time=4h", "--time=4h", "is no time"),
    "time with 75 minutes": ("--time=04:00:00", "--time=04:75:00", "--time=04:75", "is no time"),
    "time unlimited": ("--time=04:00:00", "--time=UNLIMITED", "UNLIMITED", "no limit"),
    "time of two minutes": ("--time=04:00:00", "--time=2", "--time=2", "is 120 s"),
    "time missing": ("#SBATCH --time=04:00:00\n", "", None, "--time"),
    "signal to the steps": ("B:TERM@120", "TERM@120", "--signal", "B:TERM@120"),
    "signal misspelt": ("B:TERM@120", "B:TREM@120", "--signal", "TERM"),
    "signal without its time": ("B:TERM@120", "B:TERM", "--signal", "too late"),
    "signal too late": ("B:TERM@120", "B:TERM@10", "--signal", "too late"),
    "signal that nobody answers": ("B:TERM@120", "B:USR1@120", "--signal", "trap"),
    "signal that nobody can answer": ("B:TERM@120", "B:KILL@120", "--signal", "KILL"),
    "signal missing": (SIGNAL + "\n", "", None, "--signal"),
    "trap taken out": ("trap pass_on_term TERM\n", "", "--signal", "trap"),
    "not queued again": ('    scontrol requeue "$SLURM_JOB_ID"', "    true", "--signal", "requeue"),
    "no requeue": ("--requeue\n", "--no-requeue\n", "--no-requeue", "--requeue"),
    "requeue missing": ("#SBATCH --requeue\n", "", None, "--requeue"),
    "open mode misspelt": ("--open-mode=append", "--open-mode=apend", "--open-mode", "append"),
    "open mode that truncates": ("--open-mode=append", "--open-mode=truncate", "--open-mode", "anew"),
    "open mode missing": ("#SBATCH --open-mode=append\n", "", None, "--open-mode"),
    "exclusive missing": ("#SBATCH --exclusive\n", "", None, "--exclusive"),
    "exclusive for a user": ("--exclusive\n", "--exclusive=user\n", "--exclusive", "share"),
    "shared nodes": ("--exclusive\n", "--oversubscribe\n", "--oversubscribe", "--exclusive"),
    "memory in megabytes": ("--mem=0", "--mem=64", "--mem=64", "64G"),
    "memory with a wrong unit": ("--mem=0", "--mem=64Gi", "--mem=64Gi", "amount of memory"),
    "memory twice": (*_after(SIGNAL, "#SBATCH --mem-per-cpu=4G"), "--mem-per-cpu", "exclude"),
    "GPUs in words": (GPUS[0], "#SBATCH --gpus-per-node=a100:all", "--gpus-per-node=a", "number of GPUs"),
    "no GPUs": (GPUS[0], "#SBATCH --gpus-per-node=0", "--gpus-per-node=0", "leave it out"),
    "more GPUs than a node has": (GPUS[0], "#SBATCH --gpus-per-node=800", "--gpus-per-node=8", "each node"),
    "GPUs of the whole job": (GPUS[0], "#SBATCH --gpus=8", "--gpus=8", "--gpus-per-node"),
    "GPUs in two ways": (GPUS[0], f"{GPUS[1]}\n#SBATCH --gres=gpu:1", "--gres", "leave one out"),
    "GPUs as another resource": (GPUS[0], "#SBATCH --gres=gpus:2", "--gres=gpus", "--gpus-per-node"),
    "GPUs not passed on": (GPU_PART, "--num-gpus=4", "exec ray start", "SLURM_GPUS_ON_NODE"),
    "eight tasks on a node": (TASKS, "#SBATCH --ntasks-per-node=8", "--ntasks-per-node=8", "write 1"),
    "more tasks than nodes": (TASKS, "#SBATCH --ntasks=16", "--ntasks=16", "one a node"),
    "nodes by name": (*_after(SIGNAL, "#SBATCH --nodelist=gpu[01-02]"), "--nodelist=gpu", "--constraint"),
    "no kill": (*_after(SIGNAL, "#SBATCH --no-kill"), "#SBATCH --no-kill", "--requeue"),
    "one output for all jobs": ("bigray-%j.out", "bigray.out", "--output=", "%j"),
    "unknown letter in the output": ("bigray-%j.out", "bigray-%j-%q.out", "--output=", "%q"),
    "environment left out": (*_after(SIGNAL, "#SBATCH --export=NONE"), "--export", "PATH"),
    "secret in a directive": (*_after(SIGNAL, "#SBATCH --export=ALL,HF_TOKEN=abcd1234"), "--export", "HF_TOKEN"),
    "mail of no type": (*_after(SIGNAL, "#SBATCH --mail-type=FAILED"), "--mail-type", "FAIL"),
    "no shebang": ("#!/usr/bin/env bash\n", "# a job\n", "# a job", "#!/usr/bin/env bash"),
    "no shell": ("#!/usr/bin/env bash", "#!/usr/bin/env python3", "python3", "no shell"),
    "syntax": ("if start_ray && all_nodes_are_there; then", "if start_ray && all_nodes_are_there", "else", "bash"),
    "ray stop": ("clean_up() {\n", "clean_up() {\n  ray stop\n", "  ray stop", "by pid"),
    "pkill": ("clean_up() {\n", "clean_up() {\n  pkill -f raylet\n", "  pkill", "by pid"),
    "folder of all sessions": ("clean_up() {\n", "clean_up() {\n  rm -rf /tmp/ray\n", "rm -rf /tmp/ray", "other jobs"),
    "not blocking": ("ray start --block", "ray start", "exec ray start", "--block"),
    "option that Ray has not": (START, START.replace("--num-cpus", "--cpus"), "exec ray start", "no such option"),
    "symmetric run unchecked": (
        RUN,
        RUN + "\nexport RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=180\nray symmetric-run --address $RAY_ADDRESS -- true",
        "ray symmetric-run",
        "exits 0",
    ),
    "symmetric run with 30 s": (
        RUN,
        RUN + '\nray symmetric-run --address $RAY_ADDRESS -- touch "$job_folder/done"\n[ -e "$job_folder/done" ]',
        "ray symmetric-run",
        "30 s",
    ),
    "one CPU for all of Ray": ("--cpu-bind=none \\", "\\", "  srun --nodes", "one CPU"),
    "fixed port": ("--port=0", "--port=6379", "start_nodes ", "6379"),
    "fixed port in a variable": (
        "--port=0",
        '--port="$port"\n  port=6379',
        "  port=6379",
        "same for every job",
    ),
    "default port": (" --port=0", "", "start_nodes ", "6379"),
    "fixed port of the client": ("$((20000 + SLURM_JOB_ID % 10000))", "10001", "start_nodes ", "10001"),
    "half of the ports": (WORKER_PORTS, "--min-worker-port=0", "exec ray start", "--max-worker-port"),
    "dashboard for everybody": (START, "--dashboard-host=0.0.0.0 " + START, "exec ray start", "0.0.0.0"),
    "fixed address": ('--address="$RAY_ADDRESS"', "--address=10.0.0.1:6379", "--address=10", "fixed"),
    "fixed node": ('--nodelist="$of_nodes"', "--nodelist=gpu01", "srun --nodes", "gpu01"),
    "own name's address": ("    echo 127.0.0.1\n", "    hostname -i\n", "hostname -i", "127.0.1.1"),
    "token in the file": (
        "export RAY_AUTH_MODE=token\n",
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef\n",
        "RAY_AUTH_TOKEN=0",
        "RAY_AUTH_TOKEN",
    ),
    "key of AWS in the file": (
        "\nset -euo pipefail\n",
        "\nset -euo pipefail\nKEY=AKIA0123456789ABCDEF\n",
        "AKIA",
        "AWS",
    ),
    "token off": ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=", "write RAY_AUTH_MODE=token"),
    "token not on": ("export RAY_AUTH_MODE=token\n", "", None, "RAY_AUTH_MODE"),
    "token on one node": ('PATH="$job_folder/token"', 'PATH="/tmp/token"', "TOKEN_PATH=", "all nodes"),
    "token for all to read": (TOKEN_FILE, "", "TOKEN_PATH=", "umask 077"),
    "temp folder of all jobs": (START, START.replace("$BIGRAY_TEMP", "/tmp/ours"), "exec ray start", "SLURM_JOB_ID"),
    "temp folder missing": ('--temp-dir="$BIGRAY_TEMP" ', "", "exec ray start", "/tmp/ray"),
    "temp folder too long": (
        'BIGRAY_TEMP="/tmp/bigray-',
        'BIGRAY_TEMP="/scratch/projects/vision/users/bigray/temp/',
        "BIGRAY_TEMP=",
        "107",
    ),
    "failure swallowed": (RUN, '  run bigray "$@" || true', 'run bigray "$@"', "exit code"),
    "exit code of a good job": ('\nexit "$code"', "\nexit 0", "exit 0", "bigray's code"),
    "storage that nobody shares": (
        RUN,
        RUN.replace('"$@"', 'run job.toml --set storage=runs "$@"'),
        "storage=runs",
        "/...",
    ),
    "bigray is never called": (RUN, "  run python train.py || code=$?", None, "never called"),
}


def _planted(name: str) -> tuple[str, str | None, str]:
    old, new, where, part = MISTAKES[name]
    assert OURS.count(old) == 1, f"{name}: {old!r} is in the file {OURS.count(old)} times"
    return OURS.replace(old, new), where, part


def _line_of(text: str, where: str) -> int:
    return text[: text.index(where)].count("\n") + 1


def test_our_own_file_has_no_fault() -> None:
    assert kind_of(OURS, FILE.name) is Kind.SLURM
    assert [str(fault) for fault in check_file(FILE)] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_the_one_fault_that_is_found(name: str) -> None:
    text, where, part = _planted(name)

    faults = list(check_slurm(text))

    assert len(faults) == 1, [str(fault) for fault in faults]
    assert part in str(faults[0])
    assert "\n" not in str(faults[0])
    assert faults[0].line == (None if where is None else _line_of(text, where))


def test_line_ends_of_windows_and_a_byte_order_mark_are_one_fault_each() -> None:
    assert [fault.line for fault in check_slurm(OURS.replace("\n", "\r\n"))] == [1]
    assert [fault.line for fault in check_slurm("\ufeff" + OURS)] == [1]


GOOD = r"""#!/bin/bash -l
#SBATCH -J sweep -N 4 --ntasks-per-node=1 --exclusive --time 1-00:00:00   # a day
#SBATCH --signal=B:SIGUSR1@300 --requeue --open-mode=append
#SBATCH --output=logs/%x_%j.out --error=logs/%x_%j.err
#SBATCH --gres=gpu:a100:8,lscratch:100 --mem=500G --mail-type=END,FAIL
##SBATCH --nodelist=gpu01
module load cuda    # an apostrophe isn't a quote here
cat >job.env <<'END'
this isn't a command: ray stop
END
umask 077
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/$SLURM_JOB_ID.token"
export WANDB_API_KEY=$(<~/.wandb) RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
trap 'touch again' USR1
srun --cpu-bind=none ray symmetric-run --address "$head:$((20000 + SLURM_JOB_ID % 10000))" --min-nodes 4 -- \
  bash -c 'bigray tune job.toml --set storage=s3://bucket/runs --set training.max_token=4096 && touch done' &
wait
if [ -e again ]; then scontrol requeue "$SLURM_JOB_ID"; fi
[ -f done ]
"""


def test_another_good_file_has_no_fault() -> None:
    assert [str(fault) for fault in check_slurm(GOOD)] == []


def test_an_exit_code_that_is_lost_in_a_pipe_is_found() -> None:
    text = OURS.replace("set -euo pipefail", "set -eu").replace(RUN, '  bigray "$@" | tee log')

    assert ["pipe" in str(fault) for fault in check_slurm(text)] == [True]


def test_short_options_and_several_on_a_line_are_read_as_sbatch_reads_them() -> None:
    text = OURS.replace("#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n", "#SBATCH -N 2 --ntasks-per-node 1 # two\n")

    assert list(check_slurm(text.replace("--time=04:00:00", "-t1-00"))) == []


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("04:00:00", 14400),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-00:00:10", 172810),
        ("4h", None),
        ("1:60:00", None),
        ("", None),
    ],
)
def test_times_are_what_slurm_takes_them_for(time_limit: str, seconds: int | None) -> None:
    assert seconds_of(time_limit) == seconds


def test_other_values_are_what_slurm_takes_them_for() -> None:
    assert [megabytes_of(text) for text in ("64", "64G", "2TB", "64Gi")] == [64, 65536, 2 * 2**20, None]
    assert [nodes_of(text) for text in ("2", "2-4", "4-2", "0")] == [(2, 2), (2, 4), None, None]
    assert signal_of("B:SIGTERM@120") == (True, "TERM", 120)
    assert signal_of("10") == (False, "USR1", 60)
    assert signal_of("B:NONE@5") is None


# The file itself, run by bash. Slurm and Ray are stand-ins that write down what they are asked; bigray only sleeps.

STAND_INS = {
    "scontrol": """
case "$1" in
  show) if [ "$2" = hostnames ]; then echo here; fi ;;
  requeue) echo "$2" >>"$RECORD/requeued" ;;
esac""",
    "squeue": 'cat "$RECORD/state"',
    # the last word of a step's own options is bash or rm: everything from there is the task
    "srun": """
echo "$*" >>"$RECORD/srun"
while [ "$1" != bash ] && [ "$1" != rm ]; do shift; done
exec "$@" """,
    "ray": """
echo "$*" >>"$RECORD/ray"
stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$RECORD/mode"
[ ! -e "$RECORD/broken" ] || exit 1
echo 127.0.0.1:1234 >"$BIGRAY_TEMP/ray_current_cluster"
exec sleep 60""",
    "python3": "exit 0",
    "bigray": """
echo "$* $RAY_ADDRESS $RAY_AUTH_MODE" >"$RECORD/bigray"
trap 'exit 143' TERM
[ -e "$RECORD/code" ] && exit "$(cat "$RECORD/code")"
sleep 60 & wait""",
}


_numbers = itertools.count(100)


class _Job:
    """The sbatch file as a job of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        self.record.mkdir()
        (folder / "bin").mkdir()
        for name, body in STAND_INS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        self.tell("state", "RUNNING")
        self.number = f"{os.getpid()}{next(_numbers)}"
        self.process: subprocess.Popen[bytes] | None = None

    def tell(self, name: str, text: str) -> None:
        (self.record / name).write_text(text)

    def told(self, name: str) -> str:
        path = self.record / name
        return path.read_text() if path.exists() else ""

    def start(self, *arguments: str) -> None:
        environment = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": self.number,
            "SLURM_JOB_NODELIST": "here",
            "SLURM_CPUS_ON_NODE": "4",
            "RAY_AUTH_TOKEN": "of-the-user",
        }
        output = (self.folder / "out").open("wb")
        self.process = subprocess.Popen(
            ["bash", FILE, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
        )

    def code(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=20)

    def end_by_signal(self) -> int:
        assert self.process is not None
        deadline = time.monotonic() + 20
        while not self.told("bigray"):
            assert time.monotonic() < deadline, (self.folder / "out").read_text()
            time.sleep(0.02)
        self.process.send_signal(signal.SIGTERM)
        return self.code()

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its own session
            self.process.wait()
        shutil.rmtree(self.temp, ignore_errors=True)

    @property
    def temp(self) -> Path:
        return Path(f"/tmp/bigray-{self.number}-0")

    @property
    def left_behind(self) -> list[Path]:
        return [path for path in (self.folder / f"bigray-{self.number}", self.temp) if path.exists()]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[_Job]:
    job = _Job(tmp_path)
    yield job
    job.end()


@pytest.mark.parametrize("code", [0, 3])
def test_bigrays_exit_code_is_the_jobs(job: _Job, code: int) -> None:
    job.tell("code", str(code))
    job.start("run", "job.toml")

    assert job.code() == code
    assert job.told("bigray") == "run job.toml 127.0.0.1:1234 token\n"
    assert job.told("requeued") == ""
    assert stat.S_IMODE(int(job.told("mode"), 8)) == 0o600
    assert "--num-cpus=4 --num-gpus=0" in job.told("ray")
    assert not (job.folder / f"bigray-{job.number}" / "token").exists()
    if code == 0:
        assert job.left_behind == []


def test_the_signal_ends_bigray_and_the_job_is_queued_again(job: _Job) -> None:
    job.start("run", "job.toml")

    assert job.end_by_signal() == 143
    assert job.told("requeued") == f"{job.number}\n"


def test_a_cancelled_job_is_not_queued_again(job: _Job) -> None:
    job.tell("state", "COMPLETING")
    job.start("run", "job.toml")

    assert job.end_by_signal() == 143
    assert job.told("requeued") == ""


def test_a_head_that_does_not_start_is_an_error_of_the_cluster_with_its_log(job: _Job) -> None:
    job.tell("broken", "")
    job.start("run", "job.toml")

    assert job.code() == 5
    assert f"see {job.folder}/bigray-{job.number}/ray-here.log" in (job.folder / "out").read_text()
    assert job.told("bigray") == ""


def test_a_job_without_a_command_says_what_to_write(job: _Job) -> None:
    job.start()

    assert job.code() == 2
    assert "sbatch cluster/slurm/bigray.sbatch run" in (job.folder / "out").read_text()
