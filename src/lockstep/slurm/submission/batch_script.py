"""The batch script of a request: its #SBATCH lines, the shell around srun, and srun's own arguments, through submitit.

No torch here: the launcher uses this room.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from lockstep.runs import CodePaths
from lockstep.slurm import REQUEUE, RESTART
from lockstep.slurm.submission.profile import Profile
from lockstep.slurm.submission.resources import NodeRange


@dataclass(frozen=True)
class JobRequest:
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
        array_parallelism: How many of them may run at the same time.
    """

    name: str
    folder: Path
    here: Path
    code: CodePaths
    nodes: NodeRange
    profile: Profile
    after: str | None = None
    runs: int = 1
    array_parallelism: int = 256


class ScriptExecutor(SlurmExecutor):
    """submitit's, which also makes a script where there is no Slurm: ``--dry-run`` works on a laptop."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def batch_script(request: JobRequest) -> str:
    """The script that ``sbatch`` gets."""
    executor = make_executor(request)
    if request.runs > 1:
        executor.parameters["map_count"] = request.runs
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def make_executor(request: JobRequest) -> ScriptExecutor:
    """submitit's executor, with all that ``request`` says."""
    profile = request.profile
    executor = ScriptExecutor(folder=request.folder / "slurm", python=_python_command(request))
    # Of submitit's signal before the end nobody is told: it may come before there is a handler, and would end the rank.
    more: dict[str, Any] = {"chdir": request.here, "requeue": True, "signal": "URG@90"}
    is_range = request.nodes.min != request.nodes.max
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
        "nodes": request.nodes.max,
        "ntasks_per_node": profile.ranks,
        "cpus_per_task": profile.cpus,
        "gpus_per_node": profile.gpus_per_node or None,
        "mem": profile.mem,
        "exclusive": profile.exclusive or None,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "dependency": f"afterok:{request.after}" if request.after else None,
        "array_parallelism": request.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "job_name": None,
        "setup": _setup_lines(request),
        "srun_args": _srun_arguments(request),
        "additional_parameters": more,
    }
    if is_range:
        del given["ntasks_per_node"], given["cpus_per_task"]
    executor.parameters.update(given)
    return executor


def _srun_arguments(request: JobRequest) -> list[str]:
    profile = request.profile
    arguments = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if profile.cpus is not None:
        arguments.append(f"--cpus-per-task={profile.cpus}")  # srun does not inherit it
    if profile.container and profile.container.runtime == "pyxis":
        mounts = ",".join([*(f"{folder}:{folder}" for folder in _container_mounts(request)), *profile.container.mounts])
        arguments += [
            f"--container-image={profile.container.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={request.here}",
        ]
    return [*arguments, *profile.srun]


def _python_command(request: JobRequest) -> str | None:
    """The command that starts Python in the job; None is the launcher's own."""
    profile = request.profile
    if profile.container is None:
        return None if profile.python is None else shlex.quote(profile.python)
    python = profile.python or "python"
    if profile.container.runtime == "pyxis":
        return shlex.quote(python)
    binds = [
        argument for bind in (*map(str, _container_mounts(request)), *profile.container.mounts) for argument in ("--bind", bind)
    ]
    gpus = ["--nv"] if profile.gpus_per_node else []
    return shlex.join(["apptainer", "exec", *gpus, *binds, "--pwd", str(request.here), profile.container.image, python])


def _container_mounts(request: JobRequest) -> list[Path]:
    """Folders that a container must see: the runs of this name, the folder of submission, and live code."""
    wanted = [request.folder.parent, request.here, *(path for path in request.code.paths if path.is_dir())]
    return [path for path in dict.fromkeys(wanted) if not any(path != other and path.is_relative_to(other) for other in wanted)]


def _setup_lines(request: JobRequest) -> list[str]:
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
        "# srun, below, starts the ranks until the run is finished; the supervisor decides what follows each attempt.",
        f'again() {{ {_supervisor_command(request)} {slurm} "$@"; }}',
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
        f'    command srun {_task_count_arguments(request)}"$@"',
        "    next=$(again end $?)",
        "    case $next in",
        f"      {RESTART}) tries=0 ;;",
        "      '') another_try || return 1 ;;  # it was killed itself",
        f'      {REQUEUE}) until scontrol requeue "$SLURM_JOB_ID"; do another_try || return 1; done; sleep 600; return 1 ;;',
        "      *) return $next ;;",
        "    esac",
        "  done",
        "}",
    ]


def _task_count_arguments(request: JobRequest) -> str:
    """How many ranks srun starts, where sbatch could not say."""
    if request.nodes.min == request.nodes.max:
        return ""
    ranks = request.profile.ranks
    cpus = "" if request.profile.cpus else "--cpus-per-task=1 "
    return f"--ntasks=$((SLURM_NNODES * {ranks})) --ntasks-per-node={ranks} {cpus}"


def _supervisor_command(request: JobRequest) -> str:
    """The command that starts ``lockstep.slurm.supervisor`` on the first node."""
    container = request.profile.container
    python = _python_command(request) or shlex.quote(sys.executable)
    if container is not None and container.runtime == "pyxis":
        inside = [argument for argument in _srun_arguments(request) if argument.startswith("--container")]
        python = f"command srun --overlap --nodes=1 --ntasks=1 {shlex.join(inside)} {python}"
    return f"{python} -m lockstep.slurm.supervisor"
