"""The batch script of a job: its #SBATCH lines, the shell around srun, and the arguments of srun."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.compat.submitit import ScriptExecutor, batch_script_text
from lockstep.runs import CodePaths
from lockstep.slurm import ALREADY_FINISHED, ASK_AGAIN, REQUEUE, RESTART, RUNNING_JOBS
from lockstep.slurm.submission.options import LaunchOptions
from lockstep.slurm.submission.profile import Profile


class JobRequest(NamedTuple):
    """A job to submit, or an array of ``runs``; scripts, pickles and the output of srun go into ``folder/slurm``."""

    name: str
    folder: Path
    code: CodePaths
    profile: Profile
    options: LaunchOptions
    runs: int = 1


def batch_script(request: JobRequest) -> str:
    """Return the script that ``sbatch`` receives."""
    return batch_script_text(make_executor(request), request.runs)


def make_executor(request: JobRequest) -> ScriptExecutor:
    """Build the submitit executor that submits ``request``."""
    profile, options = request.profile, request.options
    executor = ScriptExecutor(folder=request.folder / "slurm", python=_python_command(request))
    # By default submitit requests SIGUSR2 before the time limit, which ends a rank without a handler; SIGURG is ignored.
    additional: dict[str, Any] = {"chdir": options.working_directory, "requeue": True, "signal": "URG@90"}
    if options.nodes.is_range:
        # With --ntasks-per-node Slurm would allocate the smallest number of nodes.
        additional |= {"nodes": str(options.nodes), "cpus-per-task": node_cpus(profile)}
    if profile.reservation:
        additional["reservation"] = profile.reservation
    if options.after:
        additional["kill-on-invalid-dep"] = "yes"
    if options.is_held:
        additional["hold"] = True
    for argument in profile.sbatch:
        name, equals, value = argument[2:].partition("=")
        additional[name] = value if equals else True
    same_name = ("partition", "account", "qos", "constraint", "nodelist", "exclude", "mem", "mail_user", "mail_type")
    parameters = {name: getattr(profile, name) for name in same_name} | {
        "time": profile.minutes,
        "nodes": options.nodes.max,
        "ntasks_per_node": 1,  # the agent, which starts the ranks of its node
        "cpus_per_task": node_cpus(profile),
        "gpus_per_node": profile.gpus_per_node or None,
        "exclusive": profile.exclusive or None,
        "dependency": str(options.after) if options.after else None,
        "array_parallelism": options.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "job_name": None,
        "setup": _setup_lines(request),
        "srun_args": [
            *("--kill-on-bad-exit=1", "--open-mode=append"),
            f"--cpus-per-task={node_cpus(profile)}",  # srun does not inherit it
            *_pyxis_arguments(request),
            *profile.srun,
        ],
        "additional_parameters": additional,
    }
    if options.nodes.is_range:
        del parameters["ntasks_per_node"], parameters["cpus_per_task"]
    executor.update_parameters(**parameters)
    return executor


def node_cpus(profile: Profile) -> int:
    """CPUs per node."""
    return profile.ranks * (profile.cpus or 1)


def _pyxis_arguments(request: JobRequest) -> list[str]:
    container = request.profile.container
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join([*(f"{folder}:{folder}" for folder in _container_mounts(request)), *container.mounts])
    return [
        f"--container-image={container.image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={request.options.working_directory}",
    ]


def _python_command(request: JobRequest) -> str:
    """The shell command that starts Python in the job."""
    profile = request.profile
    if profile.container is None:
        return shlex.quote(profile.python or sys.executable)
    python = profile.python or "python"
    if profile.container.runtime == "pyxis":
        return shlex.quote(python)
    mounts = [*map(str, _container_mounts(request)), *profile.container.mounts]
    binds = [argument for mount in mounts for argument in ("--bind", mount)]
    gpus = ["--nv"] if profile.gpus_per_node else []
    workdir = ["--pwd", str(request.options.working_directory)]
    return shlex.join(["apptainer", "exec", *gpus, *binds, *workdir, profile.container.image, python])


def _container_mounts(request: JobRequest) -> list[Path]:
    """Folders that a container needs: all runs of this name, the working directory, and the code if it has no snapshot."""
    wanted = [request.folder.parent, request.options.working_directory, *(path for path in request.code.paths if path.is_dir())]
    return [path for path in dict.fromkeys(wanted) if not any(path != other and path.is_relative_to(other) for other in wanted)]


PASSED_PREFIX = "LOCKSTEP_ENV_"
"""Prefix of the variables that pass the profile's environment to the job without writing its values to a file."""

_PREAMBLE = r"""
# Record the exit status: Slurm forgets it where accounting is disabled.
export LOCKSTEP_JOB="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
exit_file=@slurm@/"$LOCKSTEP_JOB.exit"
rm -f "$exit_file"
trap 'echo $? >"$exit_file"' EXIT
trap 'exit 143' TERM  # when srun has ended; without this the status would be that of the command before it, 0
# Loading a pickle runs code: only the owner may write to this folder.
if [ -n "$(find @folder@ @slurm@ -maxdepth 0 \( ! -uid "$(id -u)" -o -perm /022 \) 2>&1)" ]; then
  echo lockstep: others can write to @folder@, so no code is loaded from it. Run chmod go-w on it and submit again. >&2
  exit 2
fi
"""


_SUPERVISED_SRUN = r"""
# Called instead of srun below. After each attempt the supervisor decides: finish, restart or requeue.
supervisor() { @supervisor@ @slurm@ "$@"; }
retry() {  # for nine minutes: a killed supervisor, which is back at once; a full disk, no slurmctld
  retries=$((retries + 1))  # not in the pipeline, whose parts are subshells
  echo "$1; tried $retries of 60 times." | tee @slurm@/"$LOCKSTEP_JOB.retry" >&2
  [ $retries -lt 60 ] || return 1
  sleep $((retries < 10 ? retries : 10))
  return 0  # also if sleep was killed
}
# Slurm is queried here, because an image has none of its commands.
query() ( unset "${!SQUEUE_@}" SLURM_CLUSTERS; export SLURM_TIME_FORMAT=%s; squeue "$@" 2>/dev/null )
running_jobs() {
  local jobs  # read before it is printed: an error of the supervisor must not look like one of squeue
  for _ in {1..300}; do
    if jobs=$(query @running_jobs@); then
      echo "$jobs${jobs:+$'\n'}end"
      return
    fi
    sleep 2
  done
  echo lockstep: squeue has not answered for ten minutes. >&2
}
cancel_steps() {  # ranks that outlive a killed srun must not train beside those of the next attempt
  local step steps running
  for _ in {1..1200}; do
    if steps=$(query --steps --noheader --jobs="$LOCKSTEP_JOB" --format=%i); then
      running=()
      for step in $steps; do [[ $step =~ \.[0-9]+$ ]] && running+=("$step"); done
      [ ${#running[@]} -gt 0 ] || return 0
      scancel "${running[@]}"
    fi
    sleep 0.5
  done
  echo lockstep: ranks of the previous attempt still run, and scancel does not end them. >&2
  return 1
}
srun() {
  retries=0 seen=
  while :; do
    printed=$(running_jobs | supervisor start $seen)
    case $? in
      0) ;;
      2) return 2 ;;
      126 | 127)
        echo "lockstep: python: the interpreter of the job cannot be run on $(hostname); set --python or the profile." >&2
        return 127 ;;
      @already_finished@) return 0 ;;
      @ask_again@) seen=$printed; continue ;;  # another job has claimed the run: query Slurm again for whether it runs
      *) retry "No attempt could be started" || return 1; continue ;;
    esac
    rm -f @slurm@/"$LOCKSTEP_JOB.retry"
    claimed=($printed)
    export LOCKSTEP_ATTEMPT=${claimed[0]} LOCKSTEP_ENDS=${claimed[1]} MASTER_PORT=${claimed[2]} LOCKSTEP_KEY=${claimed[3]}
    command srun @task_counts@"$@"
    status=$?
    [ $status -le 128 ] || cancel_steps || return 1
    decision=$(running_jobs | supervisor finish $status)
    case $decision in
      @restart@) retries=0 ;;
      '') retry "The end of the attempt could not be recorded" || return 1 ;;  # the supervisor was killed
      @requeue@) until scontrol requeue "$LOCKSTEP_JOB"; do retry "scontrol requeue fails" || return 1; done
        sleep 600
        return 1 ;;
      *) return $decision ;;
    esac
  done
}
"""


def _setup_lines(request: JobRequest) -> list[str]:
    """Shell lines between the #SBATCH lines and srun."""
    profile = request.profile
    exports = {
        "PYTHONPATH": os.pathsep.join(map(str, request.code.paths)),
        "PYTHONSAFEPATH": "1",  # keeps the working directory, which may have changed, off the path
    }
    if not profile.network:
        exports["WANDB_MODE"] = "offline"
    if profile.network_interface:
        exports |= {"NCCL_SOCKET_IFNAME": profile.network_interface, "GLOO_SOCKET_IFNAME": profile.network_interface}
    modules = map(shlex.quote, profile.modules)
    scratch = [f'export LOCKSTEP_SCRATCH="{profile.scratch}"'] if profile.scratch else []
    return [
        *_fill_in(_PREAMBLE, request),
        *(f"module load {name} || {{ echo lockstep: module load {name} failed. >&2; exit 2; }}" for name in modules),
        *profile.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        *(f'export {name}="${PASSED_PREFIX}{name}"' for name in profile.environment),  # modules may have set other values
        *scratch,
        *_fill_in(_SUPERVISED_SRUN, request),
    ]


def _fill_in(template: str, request: JobRequest) -> list[str]:
    """Lines of a shell template with its ``@names@`` replaced by values, quoted for the shell."""
    supervisor = f"{_python_command(request)} -m lockstep.slurm.supervisor"
    if pyxis := _pyxis_arguments(request):
        supervisor = f"command srun --overlap --nodes=1 --ntasks=1 {shlex.join(pyxis)} {supervisor}"
    # sbatch does not know the number of nodes in a range.
    task_counts = '--ntasks="$SLURM_NNODES" --ntasks-per-node=1 ' if request.options.nodes.is_range else ""
    values = {
        "restart": RESTART,
        "requeue": REQUEUE,
        "already_finished": str(ALREADY_FINISHED),
        "ask_again": str(ASK_AGAIN),
        "running_jobs": shlex.join(RUNNING_JOBS),
        "task_counts": task_counts,
        "supervisor": supervisor,
        "slurm": shlex.quote(str(request.folder / "slurm")),
        "folder": shlex.quote(str(request.folder)),
    }
    return [re.sub("@(\\w+)@", lambda name: values[name[1]], line) for line in template.strip().splitlines()]
