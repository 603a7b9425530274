"""What became of a job: Slurm's word, the run folder's, and the truth in one sentence.

Works without accounting: ``squeue`` knows a job until a few minutes after its end (MinJobAge), the batch script leaves its
exit status in ``slurm/<job>.exit``, and whoever asks while Slurm still knows keeps its answer in ``slurm/<job>.ended.json``.
``sacct`` is asked where it answers. No torch here.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lockstep.errors import UsageError
from lockstep.failure import Failure, attempts, first_failure
from lockstep.flags import asking
from lockstep.run import Run, read_whole, write_whole

POLL_SECONDS = 2.0
"""Time between two questions to Slurm."""

_ENDED = {
    "COMPLETED": (0, "finished"),
    "FAILED": (1, "failed"),
    "CANCELLED": (4, "cancelled"),
    "DEADLINE": (5, "over its deadline"),
    "TIMEOUT": (5, "over its time limit"),
    "OUT_OF_MEMORY": (6, "out of memory"),
    "NODE_FAIL": (7, "a node failed"),
    "BOOT_FAIL": (7, "a node failed"),
    "PREEMPTED": (7, "preempted"),
}
"""Slurm's states of a job that has ended: exit status of ``follow`` and ``status``, and a word."""

ALIVE = 3
"""Exit status of ``status`` for a job that waits or runs."""

_WAITS = {
    "Resources": "for nodes to become free",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for another job to end well",
    "BeginTime": "for its time to begin",
    "JobHeldUser": "because its user holds it (scontrol release)",
    "JobHeldAdmin": "because an administrator holds it",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "PartitionDown": "because its partition is down",
    "JobArrayTaskLimit": "for other runs of its sweep to end",
    "QOSMaxJobsPerUserLimit": "for one of your jobs to end (limit of the QOS)",
    "AssocGrpGRES": "for GPUs of your group to become free",
}
_NEVER = {
    "DependencyNeverSatisfied": "the job that it waits for did not end well",
    "PartitionTimeLimit": "it asks for more time than its partition gives",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives",
    "BadConstraints": "no node can ever give what it asks for",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
}


@dataclass(frozen=True)
class Queued:
    """A job that was submitted: one run, or a sweep.

    Attributes:
        job: Its id.
        folder: Run folder, or folder of the sweep.
        name: Name of the job.
        runs: Number of runs.
        conf: ``SLURM_CONF`` at submission: which cluster it was.
        time: Of submission, in seconds since 1970.
        recycled: Whether Slurm has given its id to another job since.
    """

    job: str
    folder: Path
    name: str
    runs: int
    conf: str
    time: float = 0.0
    recycled: bool = False

    @property
    def members(self) -> list[tuple[str, Run]]:
        """Id and folder of every run."""
        if self.runs == 1:
            return [(self.job, Run(self.folder))]
        digits = max(3, len(str(self.runs - 1)))
        return [
            (f"{self.job}_{index}", Run(self.folder.with_name(f"{self.folder.name}-{index:0{digits}}")))
            for index in range(self.runs)
        ]


@dataclass(frozen=True)
class Slot:
    """What Slurm says of a job; times as it writes them.

    Attributes:
        state: Such as PENDING, RUNNING, FAILED.
        reason: Why it is in that state.
        start: When it started, or is expected to.
        elapsed, limit: Time used, and allowed.
        nodes: Its nodes.
        status: Exit status of the batch script; 128 and more for a signal.
        restarts: How often Slurm has started it again.
    """

    state: str
    reason: str = ""
    start: str = ""
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""
    status: int = 0
    restarts: int = 0

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state in _ENDED


@dataclass(frozen=True)
class View:
    """All that is known of one run.

    Attributes:
        job: Its job's id.
        run: Its folder.
        exit_status: 0 finished · 1 failed · 2 usage error · 3 waits, runs or unknown · 4 cancelled · 5 over its time limit ·
            6 out of memory · 7 a node failed · 130, 143 interrupted.
        state: One or a few words.
        sentence: What there is to say about it; may be empty.
        slot: Slurm's word; None if it has forgotten the job.
        progress: ``status.json``.
        result: ``result.json``.
    """

    job: str
    run: Run
    exit_status: int
    state: str
    sentence: str
    slot: Slot | None
    progress: dict[str, Any]
    result: dict[str, Any]

    @property
    def alive(self) -> bool:
        """Whether it waits or runs, as far as anybody knows."""
        return self.exit_status == ALIVE

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return self.run.newest_attempt

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of every metric."""
        return self.result.get("metrics") or self.progress.get("metrics") or {}

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        launch = _launch(self.run)
        return {
            "job": self.job,
            "run": str(self.run.folder),
            "state": self.state,
            "exit_status": self.exit_status,
            "sentence": self.sentence,
            "attempt": self.attempt,
            "attempts": [asdict(attempt) for attempt in attempts(self.run)],
            "slurm": asdict(self.slot) if self.slot else None,
            "progress": self.progress,
            "metrics": self.metrics,
            "result": self.result,
            "sweep": launch.get("sweep"),
        }


def holds(owner: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    """Whether the job, or the process on this machine, that has claimed a run still has it."""
    if job := str(owner.get("job", "")):
        if shutil.which("squeue", path=env.get("PATH")) is None:
            return False
        command = ["squeue", "--all", "--noheader", f"--jobs={job}", "--Format=State"]
        return subprocess.run(command, env=asking(env), capture_output=True, text=True).stdout.split() == ["RUNNING"]
    return owner.get("host") == platform.node() and Path("/proc", str(owner.get("pid"))).exists()


def record(queued: Queued, env: Mapping[str, str]) -> None:
    """Remember a submission, for ``jobs.py``."""
    path = _index(env)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    row = asdict(queued) | {"folder": str(queued.folder), "time": time.time()}
    del row["recycled"]
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
        begun = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # by a full disk
        # In one piece: others append too.
        file.write((b"\n" if begun else b"") + (json.dumps(row, ensure_ascii=False) + "\n").encode())


def recorded(env: Mapping[str, str]) -> list[Queued]:
    """All submissions to this cluster from this machine whose folder is still there, oldest first."""
    return [job for job in _all_recorded(env) if job.folder.is_dir()]


def _all_recorded(env: Mapping[str, str]) -> list[Queued]:
    path = _index(env)
    here: list[Queued] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            job = Queued(**row | {"folder": Path(row["folder"])})
        except (ValueError, TypeError, KeyError):  # half a line, which a full disk has left
            continue
        if job.conf == env.get("SLURM_CONF", ""):
            here.append(job)
    owners = {job.job: job for job in here}
    return [replace(job, recycled=owners[job.job] is not job) for job in here]


def find(which: str | None, env: Mapping[str, str]) -> Queued:
    """The submission called ``which``: a job's id, that of one run of a sweep, or a run folder; the last one if None.

    Raises:
        UsageError: There is none.
    """
    jobs = _all_recorded(env) if which else recorded(env)
    if which is None:
        if not jobs:
            raise UsageError("No job was submitted to this cluster yet; launch/slurm.py does it.")
        return jobs[-1]
    main, _, index = which.partition("_")
    folder = Path(which).absolute()
    for job in reversed(jobs):
        if which == job.job or folder == job.folder:
            return job
        if main == job.job or folder.parent == job.folder.parent:
            for number, (member, run) in enumerate(job.members if job.runs > 1 else []):
                if index == str(number) or folder == run.folder:
                    return replace(job, job=member, folder=run.folder, runs=1)
    raise UsageError(f"{which}: no such job was submitted with lockstep; jobs.py list shows those that were.")


def mark_cancelled(views: Iterable[View]) -> None:
    """Remember that these were cancelled: of a run of a sweep that never started, Slurm soon knows nothing any more."""
    for view in views:
        if view.alive and (folder := _slurm_folder(view.run)).is_dir():
            (folder / f"{view.job}.cancelled").touch()


def look(jobs: Iterable[Queued], env: Mapping[str, str]) -> list[View]:
    """What is known of every run of these submissions, with one question to Slurm."""
    jobs = list(jobs)
    slots, silence = _ask({id_ for job in jobs if not job.recycled for id_, _ in job.members}, env)
    return [_view(id_, run, job, None if job.recycled else slots.get(id_), silence) for job in jobs for id_, run in job.members]


def _view(job: str, run: Run, queued: Queued, slot: Slot | None, silence: str) -> View:
    slurm = queued.folder / "slurm" if (queued.folder / "slurm").is_dir() else _slurm_folder(run)
    kept = slurm / f"{job}.ended.json"
    if slot is not None and slot.ended:
        if not kept.exists() and slurm.is_dir():
            write_whole(kept, asdict(slot))
    elif slot is None and (before := read_whole(kept)):
        slot = Slot(**before)
    progress, result = read_whole(run.status), read_whole(run.result)
    known = slot is not None or result.get("status") == "finished" or (slurm / f"{job}.exit").exists()
    if silence and not known:
        status, state, sentence = ALIVE, "unknown", f"Slurm does not answer: {silence}"
    else:
        status, state, sentence = _verdict(job, run, slurm, slot, result)
    return View(job, run, status, state, sentence, slot, progress, result)


def _verdict(job: str, run: Run, slurm: Path, slot: Slot | None, result: dict[str, Any]) -> tuple[int, str, str]:
    """Exit status, state and sentence of a run."""
    if slot is not None and not slot.ended:
        if slot.state != "PENDING":
            number = run.newest_attempt
            failed = first_failure(run, number) if number else None
            return ALIVE, slot.state.lower(), f"Attempt {number} has failed: {failed.reason}" if failed else ""
        if slot.reason in _NEVER:
            return ALIVE, "waiting", f"It will never start: {_NEVER[slot.reason]} (Slurm: {slot.reason}); cancel it."
        if slot.reason == "None":
            return ALIVE, "waiting", "Slurm has not looked at it yet."
        why = _WAITS.get(slot.reason.partition(",")[0].strip("()"), f"for what Slurm calls {slot.reason}")
        return ALIVE, "waiting", f"It waits {why}." + (f" Expected start: {slot.start}." if slot.start[:1].isdigit() else "")
    exited, output = _exit_file(slurm / f"{job}.exit"), output_of(run, slurm, job)
    attempt = run.newest_attempt
    failure = first_failure(run, attempt) if attempt else None
    said = last_words(output)
    ate_too_much = said.startswith("Slurm says")
    if slot is not None and slot.state not in ("COMPLETED", "FAILED"):
        status, word = _ENDED[slot.state]
        more = {
            "TIMEOUT": f"It was ended at its time limit of {slot.limit}; ask for more with --time.",
            "OUT_OF_MEMORY": f"It used more memory than it had asked for; ask for more with --mem. {said}".strip(),
            "NODE_FAIL": f"A node of {slot.nodes} went away.",
            "CANCELLED": "The job that it waited for did not end well." if slot.reason == "DependencyNeverSatisfied" else "",
        }
        if slot.state == "CANCELLED" and ate_too_much:
            return 6, "out of memory", more["OUT_OF_MEMORY"]
        return status, word, more.get(slot.state, said)
    if result.get("status") == "finished" and (slot is None or slot.state == "COMPLETED"):
        return 0, "finished", ""
    # A rank that lost its peers, or was told to leave because of one, does not know why.
    knows = failure is not None and not failure.echo and not failure.interrupted
    if ate_too_much and not knows:
        return 6, "out of memory", f"It used more memory than it had asked for; ask for more with --mem. {said}"
    if failure is not None and knows:
        return _of_run(failure.exit_status), "failed", failure.reason
    if slot is None and (slurm / f"{job}.cancelled").exists():
        return 4, "cancelled", ""
    if slot is None and (why := _cancelled_by_slurm(output)):
        return _ENDED[why][0], _ENDED[why][1], "Slurm says so in the job's output."
    if said:
        return 1, "failed", said
    if words := exit_words(output, failure):
        return 1, "failed", words
    if failure is not None and failure.interrupted:
        return _of_run(failure.exit_status), "interrupted", failure.reason
    if result.get("reason"):
        return {"interrupted": 143}.get(result["status"], _of_run(exited or 1)), result["status"], str(result["reason"])
    if slot is None and exited is None:
        return 1, "gone", "It ended without a word, and Slurm has forgotten it: cancelled, over a limit, or a node was lost."
    status = _of_run(exited or (slot.status if slot else 1))
    return status, "failed", f"It ended without a word; the last one of its output: {_tail(output)}"


def _of_run(status: int) -> int:
    """The exit status of a run: what a script or a user's code may have ended with must not look like one of Slurm's."""
    return status if status in (2, 130, 138, 140, 143) else 1


def output_of(run: Run, slurm: Path, job: str) -> str:
    """What the batch script and srun have printed since the newest attempt of this job began."""
    begun = read_whole(run.folder / "logs" / str(run.newest_attempt) / "begun.json")
    try:
        with (slurm / f"{job}_0_log.out").open(errors="replace") as file:
            file.seek(begun.get("output", 0) if begun.get("job") == job else 0)
            return file.read()
    except FileNotFoundError:
        return ""


def _cancelled_by_slurm(output: str) -> str:
    """Slurm's state of a job that it has forgotten, from what slurmstepd wrote when the job was ended; empty if nothing."""
    why = re.search(r"CANCELLED AT \S+ DUE TO (TIME LIMIT|NODE FAILURE|PREEMPTION)", output)
    return {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}[why[1]] if why else ""


def last_words(text: str) -> str:
    """What srun says of a task that was killed, in the output of an attempt."""
    if over := re.search(r"(?i)error: .*?(exceeded .*memory.*|out[- ]of[- ]memory.*|oom.kill.*)", text):
        return f"Slurm says: {over[1].strip().rstrip('.')}."
    killed = re.findall(r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Segmentation fault|Bus error|Aborted)", text)
    if killed:
        node, task, how = killed[0]
        return f"rank {task} on {node}: {how} (a signal ended it; SIGKILL may be the kernel, out of memory)."
    return ""


def exit_words(text: str, failure: Failure | None) -> str:
    """What srun says of the first task that ended by itself, where no rank has told more."""
    if (found := re.search(r"error: (execve\(\): .+)", text)) and failure is None:
        return f"Slurm says: {found[1].rstrip('.')}."
    first = re.search(r"srun: error: (\S+): tasks? ([\d,-]+): Exited with exit code (\d+)", text)
    if first is None or int(first[3]) in (130, 143):
        return ""
    return f"rank {first[2]} on {first[1]} ended with exit status {first[3]} and without a word."


def _exit_file(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing."


def _launch(run: Run) -> dict[str, Any]:
    return yaml.safe_load(run.launch.read_text()) or {} if run.launch.exists() else {}


def _slurm_folder(run: Run) -> Path:
    """Where the scripts and the output of a run's job are; those of a sweep lie together."""
    sweep = _launch(run).get("sweep") or {}
    return (run.folder.with_name(sweep["id"]) if sweep else run.folder) / "slurm"


def _index(env: Mapping[str, str]) -> Path:
    state = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(state) / "lockstep" / "jobs.jsonl"


_FIELDS = ("JobID", "ArrayJobID", "ArrayTaskID", "State", "Reason", "StartTime", "TimeUsed", "TimeLimit", "NodeList")


def _ask(ids: set[str], env: Mapping[str, str]) -> tuple[dict[str, Slot], str]:
    """Slurm's word on the jobs that it still knows, and with accounting on the others too; why it says nothing, if so."""
    if not ids:
        return {}, ""
    if shutil.which("squeue", path=env.get("PATH")) is None:
        return {}, "there is no squeue here."
    format_ = ",".join(f"{name}:|" for name in (*_FIELDS, "exit_code", "RestartCnt"))
    # Not --jobs: one that Slurm has forgotten makes an error of the whole answer.
    command = ["squeue", "--all", "--array", "--states=all", "--noheader", "--me", f"--Format={format_}"]
    answer = subprocess.run(command, env=asking(env), capture_output=True, text=True)
    if answer.returncode:
        return {}, answer.stderr.strip().splitlines()[-1].removeprefix("slurm_load_jobs error: ")
    slots: dict[str, Slot] = {}
    for line in answer.stdout.splitlines():
        job, array, task, state, reason, start, elapsed, limit, nodes, code, restarts, *_ = line.split("|")
        name = f"{array}_{task}" if task != "N/A" else job
        status = os.waitstatus_to_exitcode(int(code)) if code.isdigit() else 0
        slots[name] = Slot(state, reason, start, elapsed, limit, nodes, status if status >= 0 else 128 - status, int(restarts))
    return _from_accounting(ids - set(slots), asking(env)) | slots, ""


def _from_accounting(ids: set[str], env: Mapping[str, str]) -> dict[str, Slot]:
    """What ``sacct`` says, where there is accounting."""
    if not ids or shutil.which("sacct", path=env.get("PATH")) is None:
        return {}
    jobs = sorted({id_.partition("_")[0] for id_ in ids})
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}"]
    answer = subprocess.run(
        [*command, "--format=JobID,State,Reason,Start,Elapsed,Timelimit,NodeList,ExitCode"],
        env=dict(env),
        capture_output=True,
        text=True,
    )
    slots: dict[str, Slot] = {}
    for line in answer.stdout.splitlines():
        job, state, reason, start, elapsed, limit, nodes, code = line.split("|")
        status, _, killed = code.partition(":")
        exited = int(status) or (128 + int(killed) if killed and int(killed) else 0)
        slots[job] = Slot(state.split()[0], reason, start, elapsed, limit, nodes, exited)
    return slots


def follow(queued: Queued, env: Mapping[str, str], rank: int = 0, seen: View | None = None) -> int:
    """Print a rank's log until the job ends and return its exit status; Ctrl-C stops the following, never the job.

    For a sweep, one line whenever one of its runs changes; the exit status is that of the first that did not finish.

    Args:
        queued: The job.
        env: Environment for Slurm's commands.
        rank: Whose log.
        seen: What was known just now, with a log that has been shown already.
    """
    logs = _Log(queued, rank, seen.attempt if seen else 0) if queued.runs == 1 else None
    said: dict[str, tuple[str, str]] = {}
    asked = time.monotonic() if seen else 0.0
    try:
        while True:
            if logs is not None:
                for text in logs.news():
                    print(text, end="", flush=True)
            if time.monotonic() - asked < POLL_SECONDS:
                time.sleep(0.2)
                continue
            views = look([queued], env)
            asked = time.monotonic()
            for view in views:
                if said.get(view.job) != (view.state, view.sentence):
                    said[view.job] = view.state, view.sentence
                    print(f"job {view.job}: {view.state}. {view.sentence}".rstrip(), flush=True)
            if not any(view.alive for view in views):
                if logs is not None:
                    for text in logs.news():
                        print(text, end="", flush=True)
                return next((view.exit_status for view in views if view.exit_status), 0)
    except KeyboardInterrupt:
        again = f"logs -f {queued.job} follows it again" if queued.runs == 1 else f"status {queued.job} shows it"
        print(f"\njob {queued.job} goes on; jobs.py {again}.", flush=True)
        return 130


class _Log:
    """A rank's log as it grows, attempt after attempt.

    Args:
        queued: The job.
        rank: Whose log.
        shown: Number of the attempt whose log has been shown already; 0 for none.
    """

    def __init__(self, queued: Queued, rank: int, shown: int) -> None:
        self._run, self._rank = queued.members[0][1], rank
        self._attempt = shown
        self._read = path.stat().st_size if (path := self._path(shown)).exists() else 0

    def _path(self, attempt: int) -> Path:
        return self._run.folder / "logs" / str(attempt) / f"{self._rank}.log"

    def news(self) -> Iterator[str]:
        """What was written since the last call."""
        newest = self._run.newest_attempt
        for attempt in range(max(1, self._attempt), newest + 1):
            if attempt != self._attempt:
                self._attempt, self._read = attempt, 0
            path = self._path(attempt)
            if path.exists():
                with path.open(errors="replace", newline="") as file:
                    file.seek(self._read)
                    text = file.read()
                    self._read = file.tell()
                if text:
                    yield text
