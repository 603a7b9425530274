"""Record what the commands of this machine's Slurm print, into ``tests/slurm/golden/<version>``.

    PYTHONPATH=src:tests .venv/bin/python -m support.golden_slurm
    slurm/debian.sh 24.11 env PYTHONPATH=src:tests .venv/bin/python -m support.golden_slurm

The second one writes into the clone in that root. Ids of jobs are the same in each version.
"""

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from lockstep.slurm.accounting import _COMMAND as ACCOUNTED
from lockstep.slurm.client import JOBS, PARTITIONS, QUEUED_SCRIPTS, RUNNING_JOBS, STATES_OF_JOB
from lockstep.slurm.cluster import Cluster
from support.runs import REPO
from support.waiting import wait_until

FOLDER = Path("/tmp/lockstep-golden")
GOLDEN = REPO / "tests" / "slurm" / "golden"

JOBS_OF_SCENARIO = {
    "timeout": ("--partition=short --time=1 --nodelist=n1", "srun sleep 600"),
    "held": ("--hold", "true"),
    "dependency": ("--dependency=afterok:2", "true"),
    "running": ("--nodelist=n1", "srun sleep 600"),
    "completing": ("--nodelist=n1", "trap '' TERM; while :; do sleep 1; done"),
    "preempted": ("--partition=low --nodelist=n2 --exclusive --requeue", "trap '' TERM; while :; do sleep 1; done"),
    "preempting": ("--partition=high --nodelist=n2 --exclusive", "sleep 1"),
    "completed": ("--nodelist=n1", "true"),
    "failed": ("--nodelist=n1", "exit 3"),
    "killed": ("--nodelist=n1", "kill -9 $$"),
    "task-killed": ("--nodelist=n1", "srun --kill-on-bad-exit=1 bash -c 'kill -9 $$'"),
    "task-exited": ("--nodelist=n1", "srun --kill-on-bad-exit=1 bash -c 'exit 7'"),
    "task-missing": ("--nodelist=n1", "srun /nope/python"),
    "never": ("--dependency=afterok:9", "true"),
    "never-cancelled": ("--dependency=afterok:9 --kill-on-invalid-dep=yes", "true"),
    "requeued": ("--nodelist=n1 --requeue", "srun sleep 600"),
    "node-failed": ("--nodelist=n3 --no-requeue", "srun sleep 600"),
    "cancelled": ("--nodelist=n1", "srun sleep 600"),
    "array": ("--array=0-3%2 --nodelist=n1", "[ $SLURM_ARRAY_TASK_ID = 0 ] && exit 1; sleep 600"),
}
"""Name, arguments of sbatch and script of each job, in the order of their ids."""

REFUSED = {
    "partition": "--partition=nowhere",
    "nodes": "--nodes=9",
    "cpus": "--cpus-per-task=64",
    "gpus": "--gpus-per-node=9",
    "time": "--partition=short --time=10",
    "array-size": "--array=0-2000",
    "down-node": "--nodelist=n4",
}
"""What ``sbatch --test-only`` refuses, or may refuse."""


PARTITION_LINES = (
    *("debug Default=YES PreemptMode=OFF", "short MaxTime=1 PreemptMode=OFF"),
    *("low PreemptMode=REQUEUE GraceTime=30", "high PriorityTier=10"),
)
OPTIONS = (
    *("SlurmdTimeout=15", "MessageTimeout=5", "KillWait=6", "MinJobAge=600"),
    *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"),
)


def record() -> None:
    """Run the scenario, and write what the commands print at each of its moments."""
    with Cluster.up(
        FOLDER, nodes=4, cpus=8, gpus=4, memory=64000, partitions=PARTITION_LINES, options=OPTIONS, accounting=True
    ) as cluster:
        env = os.environ | cluster.env
        version = re.search(r"\d+\.\d+", cluster.command("sbatch", "--version"))
        assert version is not None
        folder = GOLDEN / version[0]
        folder.mkdir(parents=True, exist_ok=True)

        def run(*command: str) -> str:
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            return done.stdout + done.stderr

        def write(name: str, *command: str) -> None:
            text = re.sub(rf"\b{re.escape(platform.node())}\b", "host", run(*command))
            (folder / f"{name}.txt").write_text(re.sub(r" OS=.*? RealMemory=", " OS=Linux RealMemory=", text))

        def wait_for(name: str, state: str) -> None:
            command = ("squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={ids[name]}")
            wait_until(lambda: run(*command).strip() == state, 120, lambda: run("squeue", "--states=all"), interval=0.1)

        cluster.command("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=maintenance")
        ids: dict[str, str] = {}
        for name, (arguments, text) in JOBS_OF_SCENARIO.items():
            script = FOLDER / f"{name}.sh"
            script.write_text(f"#!/bin/bash\n{text}\n")
            output = f"--output={FOLDER}/{name}.out"
            ids[name] = run("sbatch", "--parsable", output, *arguments.split(), str(script)).strip()
            if name in ("preempted", "requeued", "cancelled", "completing", "node-failed"):
                wait_for(name, "RUNNING")
        assert list(ids.values()) == [str(number + 1) for number in range(len(ids))], ids
        time.sleep(2)
        run("scancel", ids["cancelled"])
        run("scontrol", "requeue", ids["requeued"])
        run("scancel", ids["completing"])
        time.sleep(1)
        write("squeue-jobs-busy", *JOBS)
        write("squeue-running", "env", "SLURM_TIME_FORMAT=%s", "squeue", *RUNNING_JOBS)
        write("squeue-scripts", *QUEUED_SCRIPTS)
        write("squeue-steps", "squeue", "--steps", "--noheader", f"--jobs={ids['running']}", "--format=%i")
        write("squeue-states", *STATES_OF_JOB, f"--jobs={ids['array']}")
        write("squeue-unknown", *STATES_OF_JOB, "--jobs=999999")
        for name, arguments in REFUSED.items():
            command = ["sbatch", "--test-only", *arguments.split(), "--wrap=true"]
            write(f"sbatch-{name}", *command)
        cluster.lose("n3")
        wait_for("node-failed", "NODE_FAIL")
        write("sinfo", *PARTITIONS)
        write("scontrol-node", "scontrol", "--oneliner", "show", "node")
        wait_for("timeout", "TIMEOUT")
        time.sleep(8)  # until nothing is completing any more
        write("squeue-jobs-ended", *JOBS)
        sacct = (*ACCOUNTED, f"--jobs={','.join(ids.values())}")
        write("sacct", "env", "SLURM_TIME_FORMAT=%s", "SLURM_BITSTR_LEN=0", *sacct)
        write("scontrol-config", "bash", "-c", "scontrol show config | grep -E '^(ClusterName|AccountingStorageEnforce) '")
        for name in ("timeout", "preempted", "task-killed", "task-exited", "task-missing", "node-failed", "cancelled"):
            write(f"output-{name}", "cat", f"{FOLDER}/{name}.out")
        cluster.lose("slurmctld")
        write("squeue-no-answer", *JOBS)
        write("sbatch-no-answer", "sbatch", "--test-only", "--wrap=true")


if __name__ == "__main__":
    record()
