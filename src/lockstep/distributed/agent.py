"""The agent of a node: it forks and watches the ranks of its node, and forks those of the next attempt after a failure.

The agent of node 0 leads: it opens the rendezvous of the ranks, and receives the failure of each rank on any node. After a
failure it ends all ranks, and the restart policy decides whether another attempt follows. No agent repeats its imports.
"""

import ctypes
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lockstep.core import World
from lockstep.distributed.channel import Channel
from lockstep.distributed.phases import PhaseBoard
from lockstep.distributed.process_group import listen, parse_rendezvous
from lockstep.distributed.rank_group import (
    STUCK_SECONDS,
    RankGroup,
    RankOutcome,
    describe_stuck,
    first_failure,
    raise_interrupted,
    set_process_name,
)
from lockstep.runs import LOST_AGENT, Failure

_INTERVAL_SECONDS = 1.0
"""How often the agent checks the phases of the ranks."""

_CAUSE_SECONDS, _SECONDARY_SECONDS = 0.2, 5.0
"""How long to wait for reports of earlier failures, and for the cause if ranks have only lost connections so far."""


@dataclass(frozen=True)
class Plan:
    """What the agent of a node runs.

    Attributes:
        train: Runs one attempt as one rank; its third argument reports the phase that the rank enters.
        log: Log file of a rank in an attempt.
        limits: As in ``PhaseBoard``.
        record: Records why an attempt failed, from the failure of the rank that failed first. Called on node 0, and on another
            node if the agent of node 0 does not answer.
        next_attempt: Claims the next attempt if the restart policy allows one in this allocation after an attempt with this
            exit status; else returns None. Called on node 0.
    """

    train: Callable[[World, int, Callable[[str], None]], Any]
    log: Callable[[World, int], Path]
    limits: Mapping[str, float]
    record: Callable[[int, Failure], None]
    next_attempt: Callable[[int], int | None]


class Agent:
    """The agent of this node.

    Args:
        agents: This agent among those of all nodes.
        ranks: Ranks of each node.
        channel: Its connections to the others.
    """

    def __init__(self, agents: World, ranks: int, channel: Channel, plan: Plan) -> None:
        self.agents, self.ranks, self.channel, self.plan = agents, ranks, channel, plan
        self._group: RankGroup | None = None
        self._signal = 0
        self._library_children = set(_children())
        adopt_orphans()
        set_process_name(f"agent-{agents.rank}")

    def run(self, attempt: int) -> int:
        """Run this attempt and those that follow it without another ``srun``, and return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._pass_on)
        try:
            return self._lead(attempt) if self.agents.is_rank_zero else self._follow(attempt)
        finally:
            self._end_group()
            self.channel.close()

    def _pass_on(self, number: int, frame: object) -> None:
        """Pass a signal on to the ranks, to which Slurm sends most signals too: they act on the first one only."""
        self._signal = self._signal or number
        if self._group is not None:  # a second SIGINT would end a rank at once
            self._group.signal(signal.SIGTERM if number == signal.SIGINT else number)

    def _lead(self, attempt: int) -> int:
        while True:
            ended = self._lead_attempt(attempt)
            if ended.failure is not None:
                self.plan.record(attempt, ended.failure)
            following = None if ended.is_final or self._signal else self.plan.next_attempt(ended.status)
            if following is None:
                self.channel.send({"exit": True})
                return ended.status
            attempt = following

    def _lead_attempt(self, attempt: int) -> "_Ended":
        """Run one attempt on all nodes until its last rank has ended."""
        group = self._fork_on_all_nodes(attempt)
        state = _AttemptState(set(self.channel.connections))
        while group.running or state.running:
            seconds = _INTERVAL_SECONDS if state.failed_at is None else 0.1
            new, ready = group.poll(seconds, list(self.channel.connections.values()))
            for node, message in self.channel.receive(ready):
                if message is None:
                    state.lose(node)
                    if node in self.channel.silent:  # else srun reports the reason
                        new.append(RankOutcome(failure=self._silence(node)))
                elif "failure" in message:
                    new.append(_parse_outcome(message))
                else:
                    state.end(node, message)
            state.add(new)
            if state.must_end():
                self.channel.send({"end": True})
                group.end()
        state.stuck += self._end_group()
        if state.stuck:
            print(f"{describe_stuck(state.stuck)} The ranks are not restarted without srun.", file=sys.stderr, flush=True)
        return state.ended(bool(self._signal))

    def _fork_on_all_nodes(self, attempt: int) -> RankGroup:
        """Open the rendezvous of an attempt, tell the other agents to fork their ranks, and fork those of this node."""
        address = parse_rendezvous(self.agents.rendezvous)[0] if self.agents.size > 1 else "127.0.0.1"
        with listen(address, 0, self.agents.size) as listener:
            host = f"[{address}]" if ":" in address else address
            rendezvous = f"tcp://{host}:{listener.getsockname()[1]}"
            self.channel.send({"start": attempt, "rendezvous": rendezvous})
            return self._fork(attempt, rendezvous, listener)

    def _follow(self, attempt: int) -> int:
        (leader,) = self.channel.connections.values()
        while True:
            group = self._group
            if group is None:
                messages = self.channel.receive(wait([leader], _INTERVAL_SECONDS))
            else:
                new, ready = group.poll(_INTERVAL_SECONDS, [leader])
                for outcome in new:
                    if outcome.failure is not None:
                        self.channel.send(_outcome_message(outcome, outcome.failure))
                messages = self.channel.receive(ready)
            for _, message in messages:
                if message is None:  # the agent of node 0 is gone; the ranks of this node end with this process
                    if self.channel.silent:
                        self.plan.record(attempt, self._silence(0))
                    return LOST_AGENT
                if "start" in message:
                    attempt = message["start"]
                    self._fork(attempt, message["rendezvous"], None)
                elif "end" in message and group is not None:
                    group.end()
                elif "exit" in message:
                    return 0
            if group is not None and not group.running:
                self.channel.send({"stuck": self._end_group(), "signal": self._signal})

    def _silence(self, node: int) -> Failure:
        """The failure of an agent that has been silent for too long, as that of its first rank."""
        report = f"its agent has not answered for {self.channel.silent_seconds:.0f} s: it is stopped, or its node hangs."
        ranks, host = self.ranks, self.channel.hosts.get(node, "")
        return Failure(node * ranks, self.agents.size * ranks, node, host, report)

    def _fork(self, attempt: int, rendezvous: str, listener: socket.socket | None) -> RankGroup:
        size, first = self.agents.size * self.ranks, self.agents.rank * self.ranks
        worlds = [
            World(first + index, size, index, self.ranks, rendezvous if size > 1 else "", "agent")
            for index in range(self.ranks)
        ]
        if listener is not None and size > 1:
            worlds[0] = replace(worlds[0], listener=listener.fileno())
        board = PhaseBoard(self.ranks, self.plan.limits)

        def train(world: World) -> None:
            if listener is not None and world.listener is None:
                listener.close()
            self.plan.train(world, attempt, board.reporter(world.local_rank))

        handlers: dict[int, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), raise_interrupted)
        handlers[signal.SIGCONT] = signal.SIG_DFL
        # Ignored before training: there is nothing to save, and the allocation has not ended yet.
        handlers |= dict.fromkeys((signal.SIGUSR1, signal.SIGUSR2), signal.SIG_IGN)
        self._group = RankGroup(
            train, worlds, lambda world: self.plan.log(world, attempt), handlers, board, on_fork=self.channel.close
        )
        if self._signal:
            self._group.signal(self._signal)
        return self._group

    def _end_group(self) -> list[str]:
        """End what is left of the ranks and their children, and return the names of those that the kernel does not end."""
        group, self._group = self._group, None
        stuck = group.close() if group is not None else []
        if group is not None and not stuck:
            stuck = [f"a child of a rank (process {pid}) on {platform.node()}" for pid in self._kill_orphans()]
        return stuck

    def _kill_orphans(self) -> list[int]:
        """Kill the children of ranks that have ended, and their descendants, which this process adopts in turn.

        Returns:
            The processes that the kernel does not end, such as DataLoader workers that wait for a disk.
        """
        deadline = time.monotonic() + STUCK_SECONDS
        while (orphans := set(_children()) - self._library_children) and time.monotonic() < deadline:
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        return sorted(orphans)


@dataclass(frozen=True)
class _Ended:
    """How an attempt has ended on all nodes; it ``is_final`` if these agents cannot or need not run another one."""

    status: int
    failure: Failure | None
    is_final: bool


@dataclass
class _AttemptState:
    """An attempt on all nodes, as the agent of node 0 sees it.

    Attributes:
        running: The other nodes whose ranks run.
        outcomes: Of the ranks that have ended.
        stuck: Names of processes that the kernel does not end.
        is_lost: Whether an agent is gone.
        is_signalled: Whether another agent has got a signal.
        failed_at: When the first failure became known.
        is_ending: Whether all ranks have been told to end.
    """

    running: set[int]
    outcomes: list[RankOutcome] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    is_lost: bool = False
    is_signalled: bool = False
    failed_at: float | None = None
    is_ending: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether these agents cannot run another attempt."""
        return self.is_lost or bool(self.stuck)

    def lose(self, node: int) -> None:
        """The agent of a node is gone."""
        self.is_lost = True
        self.running.discard(node)

    def end(self, node: int, message: Mapping[str, Any]) -> None:
        """All ranks of a node have ended."""
        self.running.discard(node)
        self.stuck += message["stuck"]
        self.is_signalled = self.is_signalled or bool(message["signal"])

    def add(self, outcomes: Sequence[RankOutcome]) -> None:
        """Add the outcomes of ranks that have ended now. One that was told to end has not failed."""
        self.outcomes += [outcome for outcome in outcomes if not (self.is_ending and _is_interruption(outcome))]
        if self.failed_at is None and (self.is_broken or any(outcome.ends_others for outcome in self.outcomes)):
            self.failed_at = time.monotonic()

    def must_end(self) -> bool:
        """Whether to end all ranks now: once, when reports of earlier failures had time to arrive."""
        has_cause = self.is_broken or any(_is_cause(outcome) for outcome in self.outcomes)
        patience = _CAUSE_SECONDS if has_cause else _SECONDARY_SECONDS
        if self.is_ending or self.failed_at is None or time.monotonic() - self.failed_at <= patience:
            return False
        self.is_ending = True
        return True

    def ended(self, has_signal: bool) -> _Ended:
        """How the attempt has ended; ``has_signal``: this agent has got one."""
        failure = first_failure(self.outcomes)
        together = all(outcome.together for outcome in self.outcomes if outcome.failure is not None)
        status = 0 if failure is None or (together and not self.is_broken) else failure.exit_status
        if (has_signal or self.is_signalled) and failure is not None and failure.is_killed:
            failure = replace(failure, is_secondary=True)  # Slurm kills the ranks that did not end in time
        is_final = self.is_broken or self.is_signalled or failure is None
        return _Ended(
            status or (LOST_AGENT if self.is_lost else int(bool(self.stuck))), None if together else failure, is_final
        )


def _is_interruption(outcome: RankOutcome) -> bool:
    return outcome.failure is not None and outcome.failure.is_interruption


def _is_cause(outcome: RankOutcome) -> bool:
    return outcome.failure is not None and outcome.failure.is_cause


def _outcome_message(outcome: RankOutcome, failure: Failure) -> dict[str, Any]:
    return {"failure": failure.as_dict(), "together": outcome.together, "time": outcome.time}


def _parse_outcome(message: Mapping[str, Any]) -> RankOutcome:
    return RankOutcome(None, Failure.from_dict(message["failure"]), message["together"], message["time"])


def adopt_orphans() -> None:
    """Become the parent of processes whose rank has ended, such as DataLoader workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found
