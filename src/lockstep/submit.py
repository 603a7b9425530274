"""From a request to a job in Slurm's queue: the batch script, the pickles and ``sbatch``, all through submitit.

No torch here: the launcher uses this room.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from lockstep.again import HERE, QUEUE
from lockstep.errors import UsageError
from lockstep.flags import Nodes, asking
from lockstep.job import TrainJob
from lockstep.profile import Profile, minutes
from lockstep.snapshot import Code

_INHERITED = re.compile(
    r"(SLURM_(?!CONF$)|SBATCH_|SRUN_|SALLOC_|SUBMITIT_|PMI|TORCHELASTIC_|LOCKSTEP_(?!PROFILE$)|GOMP_CPU_AFFINITY$|KMP_AFFINITY$"
    r"|OMP_PROC_BIND$|OMP_PLACES$|RANK$|WORLD_SIZE$|LOCAL_RANK$|LOCAL_WORLD_SIZE$|GROUP_RANK$|MASTER_ADDR$|MASTER_PORT$"
    r"|CUDA_VISIBLE_DEVICES$|ROCR_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$)"
)
"""Variables of the shell that belong to the job it runs in, not to the one that is submitted."""

_PATIENCE_SECONDS = 60.0
"""How long a Slurm that does not answer is asked again."""


@dataclass(frozen=True)
class Request:
    """One submission: a job, or an array of them.

    Attributes:
        name: Name of the job.
        folder: Of the run, or of the sweep; scripts, pickles and srun's output go into its ``slurm/``.
        here: Folder of submission; the ranks work in it.
        code: Where the ranks import from.
        nodes: Number of nodes, or a range.
        profile: All else about resources.
        after: Job that must have ended well before; None does not wait.
        runs: Number of runs; more than one make an array.
        at_once: How many of them may run at the same time.
    """

    name: str
    folder: Path
    here: Path
    code: Code
    nodes: Nodes
    profile: Profile
    after: str | None = None
    runs: int = 1
    at_once: int = 256


class _Executor(SlurmExecutor):
    """submitit's, which also makes a script where there is no Slurm: ``--dry-run`` works on a laptop."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def scrub(env: MutableMapping[str, str]) -> list[str]:
    """Take out of ``env`` what an enclosing job has left there, and return the names; ``SLURM_CONF`` stays."""
    names = [name for name in env if _INHERITED.match(name)]
    for name in names:
        del env[name]
    return names


def batch_script(request: Request) -> str:
    """The script that ``sbatch`` gets."""
    executor = _executor(request)
    if request.runs > 1:
        executor.parameters["map_count"] = request.runs
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def would_run(request: Request, env: Mapping[str, str]) -> None:
    """Ask Slurm whether it would ever run this.

    Raises:
        UsageError: It would not; Slurm's own words, and what they mean for these resources.
    """
    # --test-only looks at nodes that are up, a submission at all of them: during maintenance it would refuse what can wait.
    patience = _Patience()
    while True:
        answer = subprocess.run(
            ["sbatch", "--test-only"],
            input=batch_script(request),
            env={**env, "SBATCH_JOB_NAME": request.name},
            capture_output=True,
            text=True,
        )
        if not (answer.returncode and patience.lasts(answer.stderr)):
            break
    if answer.returncode:
        partitions = _partitions(env)
        if not ("node configuration is not available" in answer.stderr and _could_if_all_were_up(request, partitions)):
            raise UsageError(_sentence(answer.stderr, request, partitions))
    profile = request.profile
    if profile.minutes is not None and not profile.qos and not _names(profile.sbatch) & {"qos", "partition", "time"}:
        _refuse_time_over_limit(request, profile.minutes, _partitions(env))


def refuse_dead_dependency(job: str, env: Mapping[str, str]) -> None:
    """Raise UsageError unless ``job`` waits, runs, or has just ended well: of any other Slurm would make no condition."""
    command = ["squeue", "--all", "--array", "--states=all", "--noheader", f"--jobs={job}", "--Format=State"]
    answer = subprocess.run(command, env=asking(env), capture_output=True, text=True)
    states = set(answer.stdout.split())
    if not states:
        raise UsageError(f"--after: Slurm does not know job {job}, or has forgotten it; if it ended well, leave --after out.")
    if bad := states - {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "COMPLETED"}:
        raise UsageError(f"--after: job {job} has not ended well ({', '.join(sorted(bad))}), so this one would never start.")


def submit(request: Request, jobs: Sequence[TrainJob], env: MutableMapping[str, str]) -> str:
    """Queue ``jobs``, one per run, with one call of ``sbatch``, and return the job's id.

    Raises:
        UsageError: Slurm does not take it; nothing is queued.
    """
    executor = _executor(request)
    (request.folder / "slurm").mkdir(mode=0o700, exist_ok=True)
    # Not in the script, where a line break in a name would begin a new line.
    env["SBATCH_JOB_NAME"] = request.name
    patience = _Patience()
    try:
        while True:
            try:
                if len(jobs) == 1:
                    return str(executor.submit(jobs[0]).job_id)
                with executor.batch():
                    queued = [executor.submit(job) for job in jobs]
                return str(queued[0].job_id).partition("_")[0]
            except (FailedJobError, FailedSubmissionError) as error:
                if not patience.lasts(str(error)):
                    raise UsageError(_sentence(str(error), request, _partitions(env))) from None
                _take_back(request, env)
    finally:
        del env["SBATCH_JOB_NAME"]


def _take_back(request: Request, env: Mapping[str, str]) -> None:
    """Cancel a job that Slurm has taken without being able to say so, and remove what was made for it."""
    slurm = request.folder / "slurm"
    command = ["squeue", "--me", "--noheader", "--Format=ArrayJobID:|,Command:|"]
    patience = _Patience()
    while (answer := subprocess.run(command, env=asking(env), capture_output=True, text=True)).returncode:
        if not patience.lasts(answer.stderr):
            break
    for line in answer.stdout.splitlines():
        job, script, *_ = line.split("|")
        if script.startswith(f"{slurm}/.submission_file"):
            subprocess.run(["scancel", job.strip()], env=dict(env), capture_output=True)
    for left in (*slurm.glob(".submission_file_*.sh"), *slurm.glob("*.pkl")):
        if not left.name.endswith("_submitted.pkl"):
            left.unlink()


class _Patience:
    """Slurm that does not answer is asked again, for a while: its controller may be restarted."""

    _SILENT = re.compile(r"(?i)unable to contact|connect failure|connection refused|timed out|zero bytes")

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._told = False

    def lasts(self, said: str) -> bool:
        """Whether to ask again after Slurm's commands have ``said`` that; waits a moment."""
        # A controller that has just come back does not know its nodes yet.
        is_new = self._told and "node configuration is not available" in said
        if not (self._SILENT.search(said) or is_new) or time.monotonic() > self._began + _PATIENCE_SECONDS:
            return False
        if not self._told:
            print(f"Slurm does not answer; it is asked again for {_PATIENCE_SECONDS:.0f} s.", file=sys.stderr, flush=True)
            self._told = True
        time.sleep(1)
        return True


def _executor(request: Request) -> _Executor:
    profile = request.profile
    executor = _Executor(folder=request.folder / "slurm", python=_python(request))
    # Of submitit's signal before the end nobody is told: it may come before there is a handler, and would end the rank.
    more: dict[str, Any] = {"chdir": request.here, "requeue": True, "signal": "URG@90"}
    is_range = request.nodes.least != request.nodes.most
    if is_range:
        # Not --ntasks-per-node, with which Slurm takes the least number; all CPUs of a node as those of one task.
        more |= {"nodes": str(request.nodes), "cpus-per-task": profile.ranks * (profile.cpus or 1)}
    if profile.reservation:
        more["reservation"] = profile.reservation
    if request.after:
        more["kill-on-invalid-dep"] = "yes"
    for argument in profile.sbatch:
        name, equals, value = argument[2:].partition("=")
        more[name] = value if equals else True
    given = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodelist": profile.nodelist,
        "exclude": profile.exclude,
        "time": profile.minutes,
        "nodes": request.nodes.most,
        "ntasks_per_node": profile.ranks,
        "cpus_per_task": profile.cpus,
        "gpus_per_node": profile.gpus_per_node or None,
        "mem": profile.mem,
        "exclusive": profile.exclusive or None,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "dependency": f"afterok:{request.after}" if request.after else None,
        "array_parallelism": request.at_once,
        "stderr_to_stdout": True,
        "wckey": None,
        "job_name": None,
        "setup": _setup(request),
        "srun_args": _srun(request),
        "additional_parameters": more,
    }
    if is_range:
        del given["ntasks_per_node"], given["cpus_per_task"]
    executor.parameters.update(given)
    return executor


def _srun(request: Request) -> list[str]:
    profile = request.profile
    arguments = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if profile.cpus is not None:
        arguments.append(f"--cpus-per-task={profile.cpus}")  # srun does not inherit it
    if profile.container and profile.container.runtime == "pyxis":
        mounts = ",".join([*(f"{folder}:{folder}" for folder in _mounted(request)), *profile.container.mounts])
        arguments += [
            f"--container-image={profile.container.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={request.here}",
        ]
    return [*arguments, *profile.srun]


def _python(request: Request) -> str | None:
    """The command that starts Python in the job; None is the launcher's own."""
    profile = request.profile
    if profile.container is None:
        return None if profile.python is None else shlex.quote(profile.python)
    python = profile.python or "python"
    if profile.container.runtime == "pyxis":
        return shlex.quote(python)
    binds = [argument for bind in (*map(str, _mounted(request)), *profile.container.mounts) for argument in ("--bind", bind)]
    gpus = ["--nv"] if profile.gpus_per_node else []
    return shlex.join(["apptainer", "exec", *gpus, *binds, "--pwd", str(request.here), profile.container.image, python])


def _mounted(request: Request) -> list[Path]:
    """Folders that a container must see: the runs of this name, the folder of submission, and live code."""
    wanted = [request.folder.parent, request.here, *(path for path in request.code.paths if path.is_dir())]
    return [path for path in dict.fromkeys(wanted) if not any(path != other and path.is_relative_to(other) for other in wanted)]


def _setup(request: Request) -> list[str]:
    """Lines of shell between the #SBATCH lines and srun."""
    profile = request.profile
    folder, slurm = shlex.quote(str(request.folder)), shlex.quote(str(request.folder / "slurm"))
    exports = {
        "PYTHONPATH": os.pathsep.join(map(str, request.code.paths)),
        "PYTHONSAFEPATH": "1",  # not the folder of submission, which may have changed
    }
    if not profile.network:
        exports["WANDB_MODE"] = "offline"
    if profile.network_interface:
        exports |= {"NCCL_SOCKET_IFNAME": profile.network_interface, "GLOO_SOCKET_IFNAME": profile.network_interface}
    exports |= profile.environment
    lines = [
        "# How this ends is written down also where Slurm keeps no accounts.",
        'export LOCKSTEP_JOB="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
        f'ended={slurm}/"$LOCKSTEP_JOB.exit"',
        'rm -f "$ended"',
        "trap 'echo $? >\"$ended\"' EXIT",
        "# Pickles are loaded from here: nobody else may be able to write here.",
        f'if [ -n "$(find {folder} {slurm} -maxdepth 0 \\( ! -uid "$(id -u)" -o -perm /022 \\) 2>&1)" ]; then',
        f"  echo lockstep: others can write to {folder}, so nothing is loaded from it. >&2",
        "  exit 2",
        "fi",
    ]
    for module in profile.modules:
        name = shlex.quote(module)
        lines.append(f"module load {name} || {{ echo lockstep: module load {name} failed. >&2; exit 2; }}")
    lines += profile.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    if profile.scratch:
        lines.append(f'export LOCKSTEP_SCRATCH="{profile.scratch}"')
    return [
        *lines,
        "# srun, below, starts the ranks until the run is finished; lockstep.again says what comes after each attempt.",
        f'again() {{ {_again(request)} {slurm} "$@"; }}',
        "another_try() { [ $((tries += 1)) -le 60 ] && sleep 10; }  # a full disk, no slurmctld, a kill: for ten minutes",
        "srun() {",
        "  while :; do",
        "    begun=$(again begin) || { [ $? -eq 2 ] && return 2; another_try || return 1; continue; }",
        "    LOCKSTEP_ATTEMPT=${begun% *} LOCKSTEP_ENDS=${begun#* }",
        "    # Where the ranks meet on the first node: a port by the job's number, on which nobody listens yet.",
        "    MASTER_PORT=$((15000 + (SLURM_JOB_ID + 37 * LOCKSTEP_ATTEMPT) % 10000))",
        '    while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do',
        "      MASTER_PORT=$((15000 + (MASTER_PORT - 15000 + 1009) % 10000))",
        "    done",
        "    export LOCKSTEP_ATTEMPT LOCKSTEP_ENDS MASTER_PORT",
        f'    command srun {_tasks(request)}"$@"',
        "    next=$(again end $?)",
        "    case $next in",
        f"      {HERE}) tries=0 ;;",
        "      '') another_try || return 1 ;;  # it was killed itself",
        f'      {QUEUE}) until scontrol requeue "$SLURM_JOB_ID"; do another_try || return 1; done; sleep 600; return 1 ;;',
        "      *) return $next ;;",
        "    esac",
        "  done",
        "}",
    ]


def _tasks(request: Request) -> str:
    """How many ranks srun starts, where sbatch could not say."""
    if request.nodes.least == request.nodes.most:
        return ""
    ranks = request.profile.ranks
    cpus = "" if request.profile.cpus else "--cpus-per-task=1 "
    return f"--ntasks=$((SLURM_NNODES * {ranks})) --ntasks-per-node={ranks} {cpus}"


def _again(request: Request) -> str:
    """The command that starts ``lockstep.again`` on the first node."""
    container = request.profile.container
    python = _python(request) or shlex.quote(sys.executable)
    if container is not None and container.runtime == "pyxis":
        inside = [argument for argument in _srun(request) if argument.startswith("--container")]
        python = f"command srun --overlap --nodes=1 --ntasks=1 {shlex.join(inside)} {python}"
    return f"{python} -m lockstep.again"


@dataclass(frozen=True)
class _Partition:
    """A partition, as ``sinfo`` describes it; where its nodes differ, CPUs and memory are the least, with a +."""

    name: str
    is_default: bool
    nodes: str
    cpus: str
    memory: str
    gres: str
    time: str
    state: str

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", self.gres))

    def __str__(self) -> str:
        gpus = self.gres if self.gres != "(null)" else "no GPUs"
        return (
            f"partition {self.name} has {self.nodes} nodes, each {self.cpus} CPUs, {self.memory} MB, {gpus}, "
            f"and a time limit of {self.time}"
        )


def _partitions(env: Mapping[str, str]) -> list[_Partition]:
    command = ["sinfo", "--all", "--exact", "--noheader", "--format=%R|%P|%D|%c|%m|%G|%l|%T"]
    rows = subprocess.run(command, env=asking(env), capture_output=True, text=True).stdout.splitlines()
    return [_Partition(name, marked.endswith("*"), *rest) for name, marked, *rest in (row.split("|") for row in rows)]


def _chosen(request: Request, partitions: Sequence[_Partition]) -> list[_Partition]:
    """The partitions that a request may run in; ``sinfo`` has a row for each kind of node."""
    names = request.profile.partition.split(",") if request.profile.partition else []
    return [p for p in partitions if p.name in names or (not names and p.is_default)]


def _could_if_all_were_up(request: Request, partitions: Sequence[_Partition]) -> bool:
    """Whether nodes that are down or drained now could make up for what is missing."""
    chosen, profile = _chosen(request, partitions), request.profile
    cpus = profile.ranks * (profile.cpus or 1)
    fitting = [p for p in chosen if int(p.cpus.rstrip("+")) >= cpus and p.gpus >= profile.gpus_per_node]
    away = [p for p in fitting if re.match(r"down|drain|drng|maint|reserved|fail|unk|no_resp|power", p.state)]
    return bool(away) and sum(int(p.nodes) for p in fitting) >= request.nodes.least


def _names(arguments: Sequence[str]) -> set[str]:
    return {argument[2:].partition("=")[0] for argument in arguments}


def _refuse_time_over_limit(request: Request, asked: int, partitions: Sequence[_Partition]) -> None:
    """Most clusters queue such a job and never start it; ``--test-only`` says nothing either."""
    limits = [p.time for p in _chosen(request, partitions)]
    if not limits or any(limit in ("infinite", "n/a") or minutes(limit) >= asked for limit in limits):
        return
    raise UsageError(_sentence("The time limit is longer than the partition's", request, partitions))


def _sentence(said: str, request: Request, partitions: Sequence[_Partition]) -> str:
    """What Slurm said, what was asked for, and what there is."""
    errors = re.findall(r"(?:sbatch: error: |allocation failure: |Batch job submission failed: )([^\n]+)", said)
    words = errors[-1].rpartition("failed: ")[2] if errors else " ".join(said.split())
    profile = request.profile
    asked = [f"{request.nodes} node{'' if request.nodes.most == 1 else 's'} of {_count(profile.ranks, 'rank')}"]
    asked += [f"{_count(profile.gpus_per_node, 'GPU')} per node"] if profile.gpus_per_node else []
    asked += [f"{_count(profile.cpus, 'CPU')} per rank"] if profile.cpus else []
    asked += [f"{profile.mem} of memory per node"] if profile.mem else []
    asked += [f"{profile.time} of time"] if profile.time else []
    asked += [f"an array of {request.runs} runs (MaxArraySize of slurm.conf is the limit)"] if request.runs > 1 else []
    kinds: dict[_Partition, int] = {}
    for partition in _chosen(request, partitions):
        kind = replace(partition, nodes="", state="")
        kinds[kind] = kinds.get(kind, 0) + int(partition.nodes)
    there_is = "; ".join(str(replace(kind, nodes=str(nodes))) for kind, nodes in kinds.items())
    if not there_is:
        names = dict.fromkeys(p.name for p in partitions)
        there_is = f"partitions are {', '.join(names)}" if names else "sinfo knows no partition"
    return f"Slurm does not take this job: {words.rstrip('.')}. Asked for: {', '.join(asked)}; {there_is}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
