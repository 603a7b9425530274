"""What the supervisor decides from files and from an answer of squeue, without Slurm."""

import errno
import io
import os
import socket
import time
from pathlib import Path

import pytest

from lockstep.core import UsageError
from lockstep.distributed import allocation_end_time
from lockstep.runs import Failure, Owner, Run, RunResult, read_attempts, record_failure, write_failed_result
from lockstep.slurm import NodeTask, supervisor
from lockstep.slurm.client import RUNNING_JOBS, is_owner_alive, parse_running_jobs, query_jobs
from lockstep.slurm.restart_policy import REQUEUE, RESTART
from lockstep.slurm.restarts import AlreadyFinished, SlurmView, UnknownOwner, finish, restart_in_allocation, start

LAST = "7|2|7|0|4102444800|N/A|RUNNING|"
"""The last run of the array 7, as squeue prints it: its own job id is that of the array."""

ARRAY = f"7|0|8|0|4102444800|N/A|\n7|1|9|1|NONE|1795716793|\n{LAST}\nend\n"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "x")


def environment(job: str, restarts: int = 0, attempt: int = 0) -> dict[str, str]:
    return {"LOCKSTEP_JOB": job, "SLURM_RESTART_COUNT": str(restarts), "LOCKSTEP_ATTEMPT": str(attempt), "PATH": ""}


def begin(run: Run, job: str, restarts: int = 0, squeue: str = ARRAY, seen: int = 0) -> int:
    env = environment(job, restarts)
    return start(run, run.folder, SlurmView.parse(squeue, env, seen), env)


def end(run: Run, job: str, attempt: int, status: int = 143, squeue: str = ARRAY, restarts: int = 0) -> str | int:
    env = environment(job, restarts, attempt)
    return finish(run, run.folder, status, SlurmView.parse(squeue, env), env)


def test_each_run_of_an_array_is_a_job_of_its_own() -> None:
    jobs = parse_running_jobs(ARRAY.removesuffix("end\n"))
    assert {name: (job.restarts, job.end, job.is_preempted) for name, job in jobs.items()} == {
        "7_0": (0, 4102444800, False),
        "7_1": (1, 0, True),
        "7_2": (0, 4102444800, False),
    }
    assert "7" not in jobs


def test_a_job_ends_on_time_in_the_hour_that_daylight_saving_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """02:30 on 25 October 2026 comes twice in Berlin, at 00:30 and at 01:30 UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        for end in (1792888200, 1792891800):
            local = time.localtime(end)
            assert time.strftime("%F %H:%M", local) == "2026-10-25 02:30"  # what squeue prints without SLURM_TIME_FORMAT
            job = parse_running_jobs(f"7|N/A|7|0|{time.strftime('%s', local)}|N/A|\n")["7"]
            assert job.end == end
            patch.setenv("LOCKSTEP_ENDS", str(job.end))
            assert allocation_end_time() == end
    time.tzset()


def test_another_job_is_queried_again_before_it_counts_as_ended(run: Run) -> None:
    assert begin(run, "7_0") == 1
    with pytest.raises(UsageError, match="is being trained by job 7_0; end that first"):
        begin(run, "7_2")
    without = LAST + "\nend\n"
    with pytest.raises(UnknownOwner) as unknown:  # may have started after this answer
        begin(run, "7_2", squeue=without)
    assert begin(run, "7_2", squeue=without, seen=unknown.value.attempt) == 2
    with pytest.raises(UsageError, match="is being trained by job 7_2"):
        begin(run, "7_0", squeue="")  # Slurm does not answer


def test_a_requeued_job_replaces_its_older_incarnation_and_is_not_replaced_by_it(run: Run) -> None:
    assert (begin(run, "7_1"), begin(run, "7_1"), begin(run, "7_1", restarts=1)) == (1, 2, 3)
    with pytest.raises(UsageError, match="is being trained by job 7_1"):
        begin(run, "7_1")


def test_the_batch_script_of_a_superseded_attempt_ends_and_records_nothing(run: Run) -> None:
    assert (begin(run, "7_1"), begin(run, "7_1", restarts=1)) == (1, 2)
    before = read_attempts(run)
    record_failure(run, 1, Failure(0, 1, 0, "", "ValueError: late"))
    assert end(run, "7_1", 1, status=1) == 1
    assert read_attempts(run) == before and not run.result.exists()


def test_an_attempt_is_recorded_and_counted_once(run: Run) -> None:
    """The agents may have recorded it, and then could not start the next one."""
    begin(run, "7_0")
    record_failure(run, 1, Failure(0, 1, 0, "", "ValueError: once"))
    assert [end(run, "7_0", 1, status=1), end(run, "7_0", 1, status=1)] == [RESTART, RESTART]
    assert [attempt.attempt for attempt in read_attempts(run)] == [1]


def test_an_agent_that_is_killed_while_it_claims_the_next_attempt_does_not_end_the_job(run: Run) -> None:
    begin(run, "7_0")
    record_failure(run, 1, Failure(0, 1, 0, "", "ValueError: once"))
    owner = run.owner.read_text()
    assert run.claim_attempt(Owner(job="7_0")) == 2
    run.owner.write_text(owner)  # killed before it became the owner
    assert end(run, "7_0", 1, status=137) == RESTART
    assert begin(run, "7_0") == 3


def interrupt(run: Run, attempt: int, number: int) -> None:
    RunResult("interrupted", attempts=attempt, reason="a signal", exit_status=number).write(run.result)


@pytest.mark.parametrize(("number", "decision"), [(143, RESTART), (140, REQUEUE)])
def test_signals_before_the_first_step_do_not_restart_a_run_for_ever(run: Run, number: int, decision: str) -> None:
    decisions = []
    for attempt in range(1, 26):
        begin(run, "7_0")
        interrupt(run, attempt, number)
        decisions.append(end(run, "7_0", attempt, number))
    assert decisions == [decision] * 24 + [number]
    result = RunResult.read(run.result)
    assert result is not None and result.status == "failed"
    assert result.reason == "25 attempts in a row have saved no checkpoint after step 0; the last: a signal"


def test_preemptions_may_happen_as_often_as_slurm_likes(run: Run) -> None:
    for attempt in range(1, 40):
        begin(run, "7_1", restarts=1)
        interrupt(run, attempt, 143)
        assert end(run, "7_1", attempt, restarts=1) == REQUEUE


def test_a_run_out_of_memory_is_given_up_although_its_memory_differs(run: Run) -> None:
    for decision in (RESTART, 1):
        attempt = begin(run, "7_0")
        report = f"The process was killed by SIGKILL: the job is out of memory; its largest process had {attempt}.9 GiB."
        record_failure(run, attempt, Failure(attempt, 4, 0, "", report, is_killed=True, is_out_of_memory=True))
        assert end(run, "7_0", attempt, status=1) == decision


@pytest.mark.parametrize("config", ["", "run:", "run: {max_restarts: many}", "run: ["])
def test_a_damaged_config_lets_the_default_number_of_restarts(run: Run, config: str) -> None:
    run.config.write_text(config)
    attempt = begin(run, "7_0")
    record_failure(run, attempt, Failure(0, 1, 0, "", "ValueError: once"))
    assert end(run, "7_0", attempt, status=1) == RESTART


def test_a_job_that_slurm_requeues_after_its_end_starts_no_attempt(run: Run) -> None:
    """Slurm 24.11 does so with each job that it has preempted before."""
    attempt = begin(run, "7_0")
    RunResult("finished", attempts=attempt).write(run.result)
    assert end(run, "7_0", attempt, status=0) == 0
    with pytest.raises(AlreadyFinished):
        begin(run, "7_0", restarts=2)
    assert run.newest_attempt == 1


def test_a_finished_run_that_cannot_be_resumed_stays_finished_but_its_job_fails(run: Run) -> None:
    RunResult("finished", attempts=begin(run, "5_0")).write(run.result)
    end(run, "5_0", 1, status=0)
    attempt = begin(run, "7_0", seen=1)
    write_failed_result(run, attempt, record_failure(run, attempt, Failure(0, 1, 0, "", "ValueError: once")))
    assert end(run, "7_0", attempt, status=1) == RESTART
    attempt = begin(run, "7_0")
    write_failed_result(run, attempt, record_failure(run, attempt, Failure(0, 1, 0, "", "size mismatch", is_permanent=True)))
    assert end(run, "7_0", attempt, status=1) == 1
    assert RunResult.read(run.result) == RunResult("finished", attempts=1)
    assert (run.is_finished_by("5_0"), run.is_finished_by("7_0")) == (True, False)
    assert [attempt.reason for attempt in read_attempts(run)] == ["", "ValueError: once", "size mismatch"]
    with pytest.raises(AlreadyFinished):
        begin(run, "5_0")


def test_each_attempt_has_a_free_port_and_a_key_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = NodeTask(run.folder, run.folder, "fit", (), "", 1, None)
    monkeypatch.setattr(supervisor, "load_task", lambda path: task)
    monkeypatch.setattr(supervisor.sys, "stdin", io.StringIO(ARRAY))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ports = iter([taken.getsockname()[1] - 15000, 5])
        monkeypatch.setattr(supervisor.secrets, "randbelow", lambda stop: next(ports))
        assert supervisor.main([str(run.folder), "start"], environment("7_2")) == 0
    attempt, ends, port, key = capsys.readouterr().out.split()
    assert (attempt, ends, port) == ("1", "4102444800", "15005") and len(key) == 64


def test_a_job_asks_again_while_slurm_does_not_say_whether_the_owner_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run, "5_0")
    task = NodeTask(run.folder, run.folder, "fit", (), "", 1, None)
    monkeypatch.setattr(supervisor, "load_task", lambda path: task)
    for answer, status in (("", 1), (ARRAY.replace("7|0|8", "5|0|8"), 2)):
        monkeypatch.setattr(supervisor.sys, "stdin", io.StringIO(answer))
        assert supervisor.main([str(run.folder), "start"], environment("7_2")) == status
        error = capsys.readouterr().err
        assert "is being trained by job 5_0" in error and ("Slurm does not answer" in error) == (status == 1)


@pytest.mark.parametrize(("left", "decision"), [(5, REQUEUE), (300, RESTART)])
def test_no_attempt_starts_in_the_last_seconds_of_an_allocation(run: Run, left: int, decision: str) -> None:
    ends = str(int(time.time()) + left)
    attempt = begin(run, "7_0")
    record_failure(run, attempt, Failure(0, 1, 0, "", "ValueError: once"))
    warm = restart_in_allocation(run, run.folder, 1, environment("7_0", attempt=attempt) | {"LOCKSTEP_ENDS": ends})
    assert warm == (None if decision == REQUEUE else 2)
    if warm is None:
        assert end(run, "7_0", attempt, status=1, squeue=ARRAY.replace("4102444800", ends)) == decision


def test_a_job_that_slurm_has_ended_is_not_restarted(run: Run) -> None:
    begin(run, "7_0")
    interrupt(run, 1, 143)
    assert end(run, "7_0", 1, squeue=LAST + "\nend\n") == 143


def squeue(folder: Path, output: str) -> dict[str, str]:
    """An environment whose squeue prints ``output``."""
    (folder / "squeue").write_text(f"#!/bin/sh\ncat <<'EOF'\n{output}EOF\n")
    (folder / "squeue").chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def write(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(supervisor, "load_task", write)
    assert supervisor.main([str(tmp_path / "slurm"), "start"], {"LOCKSTEP_JOB": "7"}) == 1
    assert capsys.readouterr().err == f"lockstep: {tmp_path} cannot be read or written (No space left on device).\n"


def test_a_squeue_that_fails_without_a_message_is_an_error(tmp_path: Path) -> None:
    env = squeue(tmp_path, "")
    (tmp_path / "squeue").write_text("#!/bin/sh\nkill -9 $$\n")
    assert query_jobs({"7"}, env) == ({}, "exit status -9")


@pytest.mark.parametrize(("code", "status"), [("0", 0), ("256", 1), ("15", 143), ("1:0", 1), ("143:0", 143), ("0:9", 137)])
def test_exit_codes_of_all_versions_of_slurm(tmp_path: Path, code: str, status: int) -> None:
    row = f"8|7|2|FAILED|NonZeroExitCode|N/A|0:01|1:00|n1|{code}|0|\n"
    states, error = query_jobs({"7_2"}, squeue(tmp_path, row))
    assert (states["7_2"].exit_status, error) == (status, "")


def test_the_owner_is_looked_for_among_the_running_jobs(tmp_path: Path) -> None:
    env = squeue(tmp_path, ARRAY.removesuffix("end\n"))
    owners = [Owner(job="7_2"), Owner(job="7"), Owner(job="7_1"), Owner(job="7_1", restarts=1)]
    assert [is_owner_alive(owner, env) for owner in owners] == [True, False, False, True]
    assert is_owner_alive(Owner(job="7_2"), {"PATH": ""}) is None
    assert "--states=RUNNING,SUSPENDED" in RUNNING_JOBS
