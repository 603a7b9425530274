"""Run a program in a fork of this process, which has imported torch already; a new process takes seconds to import it."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO


def run_forked(
    main: Callable[[Sequence[str]], int],
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run ``main(arguments)`` as a program of its own would run, and return its exit status and output.

    Args:
        main: The program's main function.
        arguments: Its arguments.
        cwd: Working directory; by default this process's.
        env: Environment; by default this process's.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:

        def child() -> None:
            for number, name, file in ((1, "stdout", output), (2, "stderr", errors)):
                os.dup2(file.fileno(), number)
                setattr(sys, name, os.fdopen(number, "w", closefd=False))
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
                sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
            if cwd is not None:
                os.chdir(cwd)
            sys.exit(main(arguments))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        status = process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(list(arguments), status, _content(output), _content(errors))


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
