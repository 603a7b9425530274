"""The snapshot of a run's code at submission: ``code/`` in the run folder, and its checksums in ``code.sha256``.

``code/project`` is the checkout (or the folder) that the job was submitted from: tracked and untracked files, but not ignored
ones. ``code/lockstep`` is lockstep itself, unless it is part of the checkout. ``sha256sum -c ../code.sha256`` in ``code/``
verifies them.
"""

import errno
import hashlib
import itertools
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from stat import S_IMODE, S_ISLNK, S_ISREG
from typing import NamedTuple, TypeVar

from lockstep.core import RunError, UsageError, file_error
from lockstep.runs.copied_files import CopiedFiles
from lockstep.runs.run import RUN_ID_PATTERN

T = TypeVar("T")
R = TypeVar("R")

LIMIT_MB, LIMIT_FILES = 100, 20_000
"""Limits of a snapshot; a larger one contains data, which belong elsewhere."""

_PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of lockstep's own package."""

_THREADS, _PROBED, _SLOW_SECONDS = 8, 32, 0.0003
"""Number of threads, number of files to measure first, and seconds for a file from which threads are worth their cost."""

_REMEDY = "add it to .gitignore, submit from a folder with only your code, or use --no-snapshot"


class CodePaths(NamedTuple):
    """Where the Python modules of a run are imported from.

    Attributes:
        paths: Entries of PYTHONPATH, in order.
        project: The folder that was copied, and its copy; None without a snapshot.
        digest: SHA-256 of ``code.sha256``, in hexadecimal; empty without a snapshot.
    """

    paths: tuple[Path, ...]
    project: tuple[Path, Path] | None
    digest: str

    def inside(self, path: Path) -> Path | None:
        """Return the copy of ``path`` in the snapshot; None if it has none."""
        if self.project is None or not path.resolve().is_relative_to(self.project[0]):
            return None
        copy = self.project[1] / path.resolve().relative_to(self.project[0])
        return copy if copy.exists() else None


def live_code(here: Path, python_path: Sequence[Path]) -> CodePaths:
    """The code without a snapshot: the folder of submission, PYTHONPATH, and lockstep, each where it is now."""
    return CodePaths((here, *(entry.absolute() for entry in python_path), _PACKAGE.parent), None, "")


def take_snapshot(here: Path, run: Path, python_path: Sequence[Path], secrets: tuple[str, ...], caches: Path) -> CodePaths:
    """Copy the code into ``run/code`` and write ``run/code.sha256`` and, in a checkout, ``run/changes.patch``.

    Args:
        here: Folder of submission; modules are imported from it. The checkout around it is copied.
        run: Run folder.
        python_path: PYTHONPATH of the launcher; entries inside the checkout are replaced by their copies.
        secrets: Texts that no file may contain.
        caches: Folder of the caches of ``CopiedFiles``, which link files that have not changed since the last snapshot.

    Raises:
        UsageError: A file contains a secret or cannot be read, or the files are too large or too many.
    """
    here = here.resolve()
    checkout, has_commit = _find_checkout(here)
    root = checkout or here
    code = run / "code"
    files = _checkout_files(root) if checkout else _folder_files(root)
    checksums = _copy(root, code / "project", files, secrets, caches)
    has_lockstep = _PACKAGE.is_relative_to(root) and (code / "project" / _PACKAGE.relative_to(root)).is_dir()
    if not has_lockstep:
        checksums |= _copy(_PACKAGE, code / "lockstep" / _PACKAGE.name, _folder_files(_PACKAGE), secrets, caches)
    prefix = len(f"{code}/")
    lines = [f"{digest}  {path[prefix:]}\n" for path, digest in sorted(checksums.items())]
    manifest = "".join(lines).encode(errors="surrogateescape")
    (run / "code.sha256").write_bytes(manifest)
    if checkout and has_commit:
        patch = _git(root, "diff", "--binary", "HEAD")
        check_secrets("changes.patch", patch, secrets)
        if patch:
            (run / "changes.patch").write_bytes(patch)

    def copied(path: Path) -> Path:
        return code / "project" / path.relative_to(root) if path.is_relative_to(root) else path

    lockstep = copied(_PACKAGE.parent) if has_lockstep else code / "lockstep"
    paths = tuple(dict.fromkeys((copied(here), *(copied(entry.resolve()) for entry in python_path), lockstep)))
    return CodePaths(paths, (root, code / "project"), hashlib.sha256(manifest).hexdigest())


def verify_snapshot(run: Path, digest: str) -> int:
    """Verify the checksum of every file in ``run/code`` and return their number; RunError names the first that differs."""
    try:
        manifest = (run / "code.sha256").read_bytes()
    except OSError as error:
        raise file_error(error, f"{run}/code.sha256 cannot be read ({error.strerror}); submit again.") from None
    if hashlib.sha256(manifest).hexdigest() != digest:
        raise RunError(f"{run}/code.sha256 is not what was submitted; submit again.")
    lines = [line.partition("  ") for line in manifest.decode(errors="surrogateescape").splitlines()]
    digests = _map_files(lambda line: _digest(run / "code" / line[2]), lines)
    for (expected, _, name), digest in zip(lines, digests, strict=True):
        if digest != expected:
            what = "changed" if digest else "missing"
            raise RunError(f"{run / 'code' / name} is {what}: this is not the code that was submitted; submit again.")
    return len(lines)


def _digest(path: Path) -> str:
    """SHA-256 of the file's content; empty if it is not a file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def _copy(root: Path, into: Path, files: Iterator[str], secrets: tuple[str, ...], caches: Path) -> dict[str, str]:
    """Copy ``files``, relative to ``root``, and return the SHA-256 of each copy. Symbolic links keep their targets."""
    copied = CopiedFiles(caches / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json", secrets)
    names = list(itertools.islice(files, LIMIT_FILES + 1))
    if len(names) > LIMIT_FILES:
        raise UsageError(f"snapshot: the code in {root} has more than {LIMIT_FILES:,} files; {_REMEDY}.")
    if broken := next((name for name in names if "\n" in name), None):
        raise UsageError(f"snapshot: the file name {broken!r} contains a line break; rename it, or {_REMEDY}.")
    try:
        states = dict(zip(names, _map_files(lambda name: _state(root, name), names), strict=True))
        sizes = {name: state.st_size for name, state in states.items() if state is not None and S_ISREG(state.st_mode)}
        if sum(sizes.values()) > LIMIT_MB * 2**20:
            largest = max(sizes, key=sizes.__getitem__)
            detail = f"{root / largest} alone has {sizes[largest] >> 20} MB"
            raise UsageError(f"snapshot: the code in {root} is larger than {LIMIT_MB} MB, {detail}; {_REMEDY}.")
        links = {Path(name) for name, state in states.items() if state is not None and S_ISLNK(state.st_mode)}
        # Skip pipes, sockets, and what is tracked below a folder that is a link now.
        folders = {
            folder for folder in set(map(os.path.dirname, states)) if links.isdisjoint((Path(folder), *Path(folder).parents))
        }
        found = {
            name: state
            for name, state in states.items()
            if state is not None and (S_ISLNK(state.st_mode) or S_ISREG(state.st_mode)) and os.path.dirname(name) in folders
        }
        for folder in dict.fromkeys(os.path.dirname(name) for name in found):
            (into / folder).mkdir(parents=True, exist_ok=True)
        made = _map_files(lambda name: _copy_file(root, into, name, found[name], secrets, copied), list(found))
        digests = {name: digest for name, digest in zip(found, made, strict=True) if digest}
        copied.write(into, found, digests)
        return {f"{into}/{name}": digest for name, digest in digests.items()}
    except OSError as error:
        disk_is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "choose another disk with --run.root" if disk_is_full else _REMEDY
        raise UsageError(f"snapshot: {error.filename or root} cannot be copied ({error.strerror}); {remedy}.") from None


def _map_files(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call ``function`` for each item and return the results in order; threads help where files are slow, as on a network."""
    start = time.monotonic()
    results = list(map(function, items[:_PROBED]))
    rest = items[_PROBED:]
    if time.monotonic() - start <= _PROBED * _SLOW_SECONDS or not rest:
        return results + list(map(function, rest))
    stopped = threading.Event()

    def run(part: Sequence[T]) -> list[R]:
        return [function(item) for item in part if not stopped.is_set()]

    size = math.ceil(len(rest) / _THREADS)
    with ThreadPoolExecutor(_THREADS) as threads:
        parts = [threads.submit(run, rest[first : first + size]) for first in range(0, len(rest), size)]
        try:
            wait(parts, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()  # after an error or Ctrl-C, skip the rest
        return results + [result for part in parts for result in part.result()]


def _state(root: Path, name: str) -> os.stat_result | None:
    """The state of the file itself, even if it is a symbolic link; None if it is tracked, but deleted."""
    try:
        return os.lstat(f"{root}/{name}")
    except (FileNotFoundError, NotADirectoryError):  # a file may have taken the place of its folder
        return None


def _copy_file(root: Path, into: Path, name: str, state: os.stat_result, secrets: tuple[str, ...], copied: CopiedFiles) -> str:
    """Copy a file with its times, or link it, and return its SHA-256; of a symbolic link return an empty text."""
    source, target = f"{root}/{name}", f"{into}/{name}"
    if S_ISLNK(state.st_mode):  # to the copy of its target, or to the target itself where that is outside
        end = (Path(source).parent / os.readlink(source)).resolve()
        inside = end.is_relative_to(root)
        os.symlink(os.path.relpath(into / end.relative_to(root), os.path.dirname(target)) if inside else end, target)
        return ""
    if digest := copied.link(name, state, target):
        return digest
    try:
        with open(source, "rb") as file:
            content = file.read()
    except FileNotFoundError:  # a temporary file
        return ""
    check_secrets(source, content, secrets)
    with open(target, "wb") as file:
        file.write(content)
        if S_IMODE(os.fstat(file.fileno()).st_mode) != S_IMODE(state.st_mode):
            os.fchmod(file.fileno(), S_IMODE(state.st_mode))
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    return hashlib.sha256(content).hexdigest()


def check_secrets(path: str, content: bytes, secrets: tuple[str, ...]) -> None:
    """Raise UsageError if ``content``, that of ``path``, contains one of ``secrets``."""
    if any(secret.encode() in content for secret in secrets):
        raise UsageError(
            f"snapshot: {path} contains the W&B key, which must not be copied; store it with `wandb login`, or {_REMEDY}."
        )


def _checkout_files(root: Path) -> Iterator[str]:
    """Tracked and untracked files of a checkout and its submodules, without ignored files and run folders."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in dict.fromkeys(listed.decode(errors="surrogateescape").split("\0")):
        if not name or any(map(RUN_ID_PATTERN.fullmatch, name.split("/"))):
            continue
        if os.path.isdir(path := root / name) and not path.is_symlink():  # a submodule, or a checkout inside this one
            inner = _checkout_files(path) if (path / ".git").exists() else _folder_files(path)
            yield from (os.path.join(name, file) for file in inner)
        else:
            yield name


def _folder_files(root: Path) -> Iterator[str]:
    """Files of a folder outside git, without hidden files, bytecode, virtual environments and run folders."""

    def refuse(error: OSError) -> None:
        raise UsageError(
            f"snapshot: the folder {error.filename} cannot be read ({error.strerror}); make it readable, or use --no-snapshot."
        )

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [
            name
            for name in folders
            if not (name.startswith(".") or name == "__pycache__" or RUN_ID_PATTERN.fullmatch(name))
            and not os.path.exists(f"{folder}/{name}/pyvenv.cfg")
        ]
        names = [*(name for name in folders if os.path.islink(f"{folder}/{name}")), *files]
        inside = f"{folder}/"[len(f"{root}/") :]
        yield from (inside + name for name in names if name[0] != "." and not name.endswith(".pyc"))


def _find_checkout(here: Path) -> tuple[Path | None, bool]:
    """The root of the git checkout around ``here`` (None without one), and whether it has a commit."""
    command = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        return None, False
    root = os.fsdecode(done.stdout.partition(b"\n")[0])
    if not root and any((folder / ".git").exists() for folder in (here, *here.parents)):
        raise _git_error(here, done.stderr)
    return Path(root) if root else None, done.returncode == 0


def _git(folder: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    if done.returncode:
        raise _git_error(folder, done.stderr)
    return done.stdout


def _git_error(folder: Path, stderr: bytes) -> UsageError:
    reason = os.fsdecode(stderr).strip().partition("\n")[0]
    return UsageError(f"snapshot: git refuses the checkout around {folder}: {reason}; fix that, or use --no-snapshot.")
