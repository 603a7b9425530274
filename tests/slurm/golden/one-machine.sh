#!/bin/bash

# Parameters
#SBATCH --chdir=/home/user/project
#SBATCH --cpus-per-task=1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/user/project/runs/digits/20260101-000000-abcd/slurm/%j_0_log.out
#SBATCH --partition=debug
#SBATCH --requeue
#SBATCH --signal=URG@90
#SBATCH --time=60

# setup
# How this ends is written down also where Slurm keeps no accounts.
export LOCKSTEP_JOB="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
ended=/home/user/project/runs/digits/20260101-000000-abcd/slurm/"$LOCKSTEP_JOB.exit"
rm -f "$ended"
trap 'echo $? >"$ended"' EXIT
# Pickles are loaded from here: nobody else may be able to write here.
if [ -n "$(find /home/user/project/runs/digits/20260101-000000-abcd /home/user/project/runs/digits/20260101-000000-abcd/slurm -maxdepth 0 \( ! -uid "$(id -u)" -o -perm /022 \) 2>&1)" ]; then
  echo lockstep: others can write to /home/user/project/runs/digits/20260101-000000-abcd, so nothing is loaded from it. >&2
  exit 2
fi
export PYTHONPATH=/home/user/project/runs/digits/20260101-000000-abcd/code/project:/home/user/project/runs/digits/20260101-000000-abcd/code/project/src
export PYTHONSAFEPATH=1
export NCCL_SOCKET_IFNAME=lo
export GLOO_SOCKET_IFNAME=lo
# srun, below, starts the ranks until the run is finished; the supervisor decides what follows each attempt.
again() { /home/user/.venv/bin/python -m lockstep.slurm.supervisor /home/user/project/runs/digits/20260101-000000-abcd/slurm "$@"; }
another_try() { [ $((tries += 1)) -le 60 ] && sleep 10; }  # a full disk, no slurmctld, a kill: for ten minutes
srun() {
  while :; do
    begun=$(again begin) || { [ $? -eq 2 ] && return 2; another_try || return 1; continue; }
    LOCKSTEP_ATTEMPT=${begun% *} LOCKSTEP_ENDS=${begun#* }
    # Where the ranks meet on the first node: a port by the job's number, on which nobody listens yet.
    MASTER_PORT=$((15000 + (SLURM_JOB_ID + 37 * LOCKSTEP_ATTEMPT) % 10000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do
      MASTER_PORT=$((15000 + (MASTER_PORT - 15000 + 1009) % 10000))
    done
    export LOCKSTEP_ATTEMPT LOCKSTEP_ENDS MASTER_PORT
    command srun "$@"
    next=$(again end $?)
    case $next in
      here) tries=0 ;;
      '') another_try || return 1 ;;  # it was killed itself
      queue) until scontrol requeue "$SLURM_JOB_ID"; do another_try || return 1; done; sleep 600; return 1 ;;
      *) return $next ;;
    esac
  done
}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /home/user/project/runs/digits/20260101-000000-abcd/slurm/%j_%t_log.out --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=1 /home/user/.venv/bin/python -u -m submitit.core._submit /home/user/project/runs/digits/20260101-000000-abcd/slurm
