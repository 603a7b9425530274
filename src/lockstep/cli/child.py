"""Run ``lockstep`` in a subprocess, for notebooks and scripts: a process that has used torch cannot fork ranks."""

import codecs
import ctypes
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lockstep.cli import main
from lockstep.core import python_path
from lockstep.runs import Owner

_TAIL = 100_000
"""Characters of the output that are kept."""


@dataclass(frozen=True)
class EndedCommand:
    """A command that has ended.

    Attributes:
        process: Its process, which the owner record of its run names.
        stdout, stderr: The end of its output.
    """

    status: int
    process: Owner
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its error message, else the last line of its output."""
        _, found, message = f"\n{self.stderr}".rpartition("\nlockstep: ")
        if found:
            return message.strip()
        lines = (self.stderr or self.stdout).strip().splitlines()
        return lines[-1] if lines else f"exit status {self.status}"


def run_command(arguments: Sequence[str]) -> EndedCommand:
    """Run ``lockstep`` with ``arguments``, and print its output immediately.

    Raises:
        KeyboardInterrupt: Ctrl-C, or an interrupted cell: all ranks have saved and stopped. A second one kills them.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "lockstep.cli.child", str(os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(_python_path())},
        process_group=0,  # a terminal would send it Ctrl-C in addition to this process
    )
    owner = Owner.of_process(process.pid)
    relay = _Relay(process)
    was_interrupted = has_ended = False
    try:
        while not has_ended:
            try:
                relay.run()
                has_ended = True
            except KeyboardInterrupt:
                _signal_group(process, signal.SIGKILL if was_interrupted else signal.SIGINT)
                was_interrupted = True
    finally:
        if not has_ended:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        relay.close()
    if was_interrupted:
        raise KeyboardInterrupt
    return EndedCommand(process.returncode, owner, *relay.texts)


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _python_path() -> list[str]:
    """PYTHONPATH of the command: that of this process, and the folders that its code added to ``sys.path``."""
    default = subprocess.run([sys.executable, "-c", "import sys; print(*sys.path, sep='\\n')"], capture_output=True, text=True)
    usual = {"", str(Path.cwd()), *default.stdout.splitlines()}
    added = [os.path.abspath(entry) for entry in sys.path if entry not in usual and os.path.exists(entry)]
    return [*map(str, python_path(os.environ)), *dict.fromkeys(added)]


class _Relay:
    """Prints the output of a process immediately; ``texts`` has the end of its standard output and error."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.texts = ["", ""]
        self._process = process
        self._pipes = (process.stdout, process.stderr)
        self._selector = selectors.DefaultSelector()
        self._decoders: list[Callable[[bytes], str]] = []
        for index, pipe in enumerate(self._pipes):
            assert pipe is not None
            self._decoders.append(codecs.getincrementaldecoder("utf-8")("replace").decode)
            self._selector.register(pipe, selectors.EVENT_READ, index)

    def run(self) -> None:
        """Print until the process ends; call it again after a KeyboardInterrupt."""
        while self._selector.get_map():
            has_ended = self._process.poll() is not None
            ready = self._selector.select(0 if has_ended else 0.2)
            for key, _ in ready:
                if data := os.read(key.fd, 65536):
                    text = self._decoders[key.data](data)
                    self.texts[key.data] = (self.texts[key.data] + text)[-_TAIL:]
                    sys.stdout.write(text)
                    sys.stdout.flush()
                else:
                    self._selector.unregister(key.fileobj)
            if has_ended and not ready:  # a process that it left behind, such as the W&B service, may hold the pipes open
                break
        self._process.wait()

    def close(self) -> None:
        self._selector.close()
        for pipe in self._pipes:
            assert pipe is not None
            pipe.close()


def _end_with_parent(parent: int) -> None:
    """End this process when the kernel or script that started it is killed: the ranks save and stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)


if __name__ == "__main__":
    _end_with_parent(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
