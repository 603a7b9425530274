#!/bin/bash

# Parameters
#SBATCH --chdir=/home/user/project
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --mem=240G
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
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
# Replaces srun below. After each attempt the supervisor decides: finish, restart or requeue.
supervisor() { /home/user/.venv/bin/python -m lockstep.slurm.supervisor /home/user/project/runs/digits/20260101-000000-abcd/slurm "$@"; }
retry() { [ $((retries += 1)) -le 60 ] && sleep 10; }  # for ten minutes: a full disk, no slurmctld, a killed supervisor
srun() {
  while :; do
    attempt=$(supervisor start) || { [ $? -eq 2 ] && return 2; retry || return 1; continue; }
    LOCKSTEP_ATTEMPT=${attempt% *} LOCKSTEP_ENDS=${attempt#* }
    # Port of the rendezvous on the first node: random, so that nobody can guess it, and the next one while it is in use.
    MASTER_PORT=$((15000 + $(od -An -N4 -tu4 /dev/urandom) % 10000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do
      MASTER_PORT=$((15000 + (MASTER_PORT - 15000 + 1009) % 10000))
    done
    export LOCKSTEP_ATTEMPT LOCKSTEP_ENDS MASTER_PORT
    command srun "$@"
    decision=$(supervisor finish $?)
    case $decision in
      restart) retries=0 ;;
      '') retry || return 1 ;;  # the supervisor was killed
      requeue) until scontrol requeue "$SLURM_JOB_ID"; do retry || return 1; done; sleep 600; return 1 ;;
      *) return $decision ;;
    esac
  done
}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /home/user/project/runs/digits/20260101-000000-abcd/slurm/%j_%t_log.out --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=8 /home/user/.venv/bin/python -u -m submitit.core._submit /home/user/project/runs/digits/20260101-000000-abcd/slurm
