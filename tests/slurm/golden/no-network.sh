#!/bin/bash

# Parameters
#SBATCH --chdir=/home/user/project
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --mem=240G
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/user/project/runs/digits/20260101-000000-abcd/slurm/%j_0_log.out
#SBATCH --partition=compute
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=URG@90
#SBATCH --time=720

# setup
# Record the exit status: Slurm forgets it where accounting is disabled.
export LOCKSTEP_JOB="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
exit_file=/home/user/project/runs/digits/20260101-000000-abcd/slurm/"$LOCKSTEP_JOB.exit"
rm -f "$exit_file"
trap 'echo $? >"$exit_file"' EXIT
trap 'exit 143' TERM  # when srun has ended; without this the status would be that of the command before it, 0
# Loading a pickle runs code: only the owner may write to this folder.
if [ -n "$(find /home/user/project/runs/digits/20260101-000000-abcd /home/user/project/runs/digits/20260101-000000-abcd/slurm -maxdepth 0 \( ! -uid "$(id -u)" -o -perm /022 \) 2>&1)" ]; then
  echo lockstep: others can write to /home/user/project/runs/digits/20260101-000000-abcd, so no code is loaded from it. Run chmod go-w on it and submit again. >&2
  exit 2
fi
ulimit -n 65536
export PYTHONPATH=/home/user/project/runs/digits/20260101-000000-abcd/code/project:/home/user/project/runs/digits/20260101-000000-abcd/code/project/src
export PYTHONSAFEPATH=1
export WANDB_MODE=offline
export LOCKSTEP_SCRATCH="/scratch/$USER/$SLURM_JOB_ID"
# Called instead of srun below. After each attempt the supervisor decides: finish, restart or requeue.
supervisor() { /home/user/.venv/bin/python -m lockstep.slurm.supervisor /home/user/project/runs/digits/20260101-000000-abcd/slurm "$@"; }
retry() {  # for nine minutes: a killed supervisor, which is back at once; a full disk, no slurmctld
  retries=$((retries + 1))  # not in the pipeline, whose parts are subshells
  echo "$1; tried $retries of 60 times." | tee /home/user/project/runs/digits/20260101-000000-abcd/slurm/"$LOCKSTEP_JOB.retry" >&2
  [ $retries -lt 60 ] || return 1
  sleep $((retries < 10 ? retries : 10))
  return 0  # also if sleep was killed
}
# Slurm is queried here, because an image has none of its commands.
query() ( unset "${!SQUEUE_@}" SLURM_CLUSTERS; export SLURM_TIME_FORMAT=%s; squeue "$@" 2>/dev/null )
running_jobs() {
  local jobs  # read before it is printed: an error of the supervisor must not look like one of squeue
  for _ in {1..300}; do
    if jobs=$(query --me --array --noheader --states=RUNNING,SUSPENDED '--Format=ArrayJobID:|,ArrayTaskID:|,JobID:|,RestartCnt:|,EndTime:|,PreemptTime:|'); then
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
      76) return 0 ;;
      75) seen=$printed; continue ;;  # another job has claimed the run: query Slurm again for whether it runs
      *) retry "No attempt could be started" || return 1; continue ;;
    esac
    rm -f /home/user/project/runs/digits/20260101-000000-abcd/slurm/"$LOCKSTEP_JOB.retry"
    claimed=($printed)
    export LOCKSTEP_ATTEMPT=${claimed[0]} LOCKSTEP_ENDS=${claimed[1]} MASTER_PORT=${claimed[2]} LOCKSTEP_KEY=${claimed[3]}
    command srun "$@"
    status=$?
    [ $status -le 128 ] || cancel_steps || return 1
    decision=$(running_jobs | supervisor finish $status)
    case $decision in
      restart) retries=0 ;;
      '') retry "The end of the attempt could not be recorded" || return 1 ;;  # the supervisor was killed
      requeue) until scontrol requeue "$LOCKSTEP_JOB"; do retry "scontrol requeue fails" || return 1; done
        sleep 600
        return 1 ;;
      *) return $decision ;;
    esac
  done
}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /home/user/project/runs/digits/20260101-000000-abcd/slurm/%j_%t_log.out --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=32 /home/user/.venv/bin/python -u -m submitit.core._submit /home/user/project/runs/digits/20260101-000000-abcd/slurm
