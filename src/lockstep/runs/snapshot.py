"""The code of a run as it was when it was submitted: ``code/`` in the run folder, with its checksums in ``code.sha256``.

``code/project`` is the checkout (or the folder) that the job was submitted from, uncommitted and untracked files included,
ignored ones not; ``code/lockstep`` is lockstep itself, where it is not part of that. ``sha256sum -c ../code.sha256`` in
``code/`` says whether they are whole. No torch here: the launcher uses this room.
"""

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.core import RunError, UsageError
from lockstep.runs.run import RUN_ID_PATTERN

LIMIT_MB, LIMIT_FILES = 100, 20_000
"""A snapshot larger than this has data in it that belong elsewhere."""


_REMEDY = "name it in .gitignore, submit from a folder that holds only your code, or use --no-snapshot"


@dataclass(frozen=True)
class CodePaths:
    """Where the Python modules of a run are imported from.

    Attributes:
        paths: For PYTHONPATH, the first wins.
        project: The folder that was copied, and its copy; None without a snapshot.
        digest: SHA-256 of ``code.sha256``, in hexadecimal; empty without a snapshot.
    """

    paths: tuple[Path, ...]
    project: tuple[Path, Path] | None
    digest: str

    def inside(self, path: Path) -> Path | None:
        """The copy of ``path`` in the snapshot, where there is one."""
        if self.project is None or not path.resolve().is_relative_to(self.project[0]):
            return None
        copy = self.project[1] / path.resolve().relative_to(self.project[0])
        return copy if copy.exists() else None


def live_code(here: Path, package: Path, python_path: str) -> CodePaths:
    """The code as it is when the job starts: the current folder and lockstep where they are."""
    own = [Path(entry).absolute() for entry in python_path.split(os.pathsep) if entry]
    return CodePaths((here, *own, package.parent), None, "")


def take_snapshot(here: Path, package: Path, run: Path, python_path: str, secrets: tuple[str, ...]) -> CodePaths:
    """Copy the code into ``run/code`` and write ``run/code.sha256`` and, in a checkout, ``run/changes.patch``.

    Args:
        here: The folder of submission; modules are imported from it. The checkout around it is copied.
        package: The folder of lockstep's own package.
        run: The run folder.
        python_path: PYTHONPATH of the launcher; entries inside the checkout become their copies.
        secrets: Texts that must not be in any file, such as the W&B key.

    Raises:
        UsageError: A file holds a secret or cannot be read, or the files are too large for code.
    """
    here, package = here.resolve(), package.resolve()
    checkout, has_commit = _checkout(here)
    root = checkout or here
    code = run / "code"
    sums = _copy(root, code / "project", _checkout_files(root) if checkout else _folder_files(root), secrets)
    inside = package.is_relative_to(root) and (code / "project" / package.relative_to(root)).is_dir()
    if not inside:
        sums |= _copy(package, code / "lockstep" / package.name, _folder_files(package), secrets)
    text = "".join(f"{digest}  {path.relative_to(code)}\n" for path, digest in sorted(sums.items()))
    manifest = text.encode(errors="surrogateescape")
    (run / "code.sha256").write_bytes(manifest)
    if checkout and has_commit:
        patch = _git(root, "diff", "--binary", "HEAD")
        check_secrets(Path("changes.patch"), patch, secrets)
        if patch:
            (run / "changes.patch").write_bytes(patch)

    def copied(path: Path) -> Path:
        return code / "project" / path.relative_to(root) if path.is_relative_to(root) else path

    own = [copied(Path(entry).resolve()) for entry in python_path.split(os.pathsep) if entry]
    lockstep = copied(package.parent) if inside else code / "lockstep"
    paths = tuple(dict.fromkeys((copied(here), *own, lockstep)))
    return CodePaths(paths, (root, code / "project"), hashlib.sha256(manifest).hexdigest())


def verify_snapshot(run: Path, digest: str) -> int:
    """Compare every file of ``run/code`` with its checksum and return their number.

    Raises:
        RunError: The snapshot is not what was submitted; names the first file that is not.
    """
    try:
        manifest = (run / "code.sha256").read_bytes()
    except OSError as error:
        raise RunError(f"The snapshot of the code in {run} cannot be read ({error.strerror}); submit again.") from None
    if hashlib.sha256(manifest).hexdigest() != digest:
        raise RunError(f"{run}/code.sha256 is not what was submitted; submit again.")
    lines = manifest.decode(errors="surrogateescape").splitlines()
    for line in lines:
        expected, _, name = line.partition("  ")
        path = run / "code" / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            what = "changed" if path.is_file() else "missing"
            raise RunError(f"{path} is {what}: this is not the code that was submitted; submit again.")
    return len(lines)


def _copy(root: Path, into: Path, files: Iterator[Path], secrets: tuple[str, ...]) -> dict[Path, str]:
    """Copy ``files``, relative to ``root``; SHA-256 of each copy. Links stay links, to what they pointed to."""
    sums: dict[Path, str] = {}
    size = 0
    largest = (0, Path())
    for count, name in enumerate(_readable(files, root)):
        if count == LIMIT_FILES:
            raise UsageError(f"snapshot: the code in {root} has more than {LIMIT_FILES:,} files; {_REMEDY}.")
        source, target = root / name, into / name
        if "\n" in str(name):
            raise UsageError(f"snapshot: the name {str(name)!r} has a line break in it; rename it, or {_REMEDY}.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                to = (source.parent / os.readlink(source)).resolve()
                # Inside, to the copy, also where the link is absolute; out of it, to what it pointed to.
                target.symlink_to(
                    os.path.relpath(into / to.relative_to(root), target.parent) if to.is_relative_to(root) else to
                )
                continue
            size += source.stat().st_size
            largest = max(largest, (source.stat().st_size, source))
            if size > LIMIT_MB * 2**20:
                of_it = f"{largest[1]} alone has {largest[0] >> 20} MB"
                raise UsageError(f"snapshot: the code in {root} is larger than {LIMIT_MB} MB, {of_it}; {_REMEDY}.")
            content = source.read_bytes()
            check_secrets(source, content, secrets)
            target.write_bytes(content)
            shutil.copymode(source, target)
        except FileNotFoundError:  # tracked, but deleted
            continue
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "choose another disk with --run.root" if full else _REMEDY
            raise UsageError(f"snapshot: {source} cannot be copied ({error.strerror}); {remedy}.") from None
        sums[target] = hashlib.sha256(content).hexdigest()
    return sums


def _readable(files: Iterator[Path], root: Path) -> Iterator[Path]:
    try:
        yield from files
    except OSError as error:
        raise UsageError(f"snapshot: {error.filename or root} cannot be read ({error.strerror}); {_REMEDY}.") from None


def check_secrets(path: Path, content: bytes, secrets: tuple[str, ...]) -> None:
    """Raise UsageError if ``content``, which is that of ``path``, holds one of ``secrets``."""
    if any(secret.encode() in content for secret in secrets):
        raise UsageError(
            f"snapshot: {path} holds the W&B key; a run folder must not: keep it with `wandb login`, or {_REMEDY}."
        )


def _checkout_files(root: Path) -> Iterator[Path]:
    """Files of a checkout: tracked and untracked ones, not the ignored ones nor run folders; those of its submodules too."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in dict.fromkeys(listed.decode(errors="surrogateescape").split("\0")):
        path = Path(name)
        if not name or any(RUN_ID_PATTERN.fullmatch(part) for part in path.parts):
            continue
        if (root / path).is_dir() and not (root / path).is_symlink():  # a submodule, or a checkout inside this one
            inner = _checkout_files(root / path) if (root / path / ".git").exists() else _folder_files(root / path)
            yield from (path / file for file in inner)
        else:
            yield path


def _folder_files(root: Path) -> Iterator[Path]:
    """Files of a folder that is no checkout; nothing hidden, nothing compiled, no virtual environment."""
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and not (here / name / "pyvenv.cfg").exists()
            and not RUN_ID_PATTERN.fullmatch(name)  # a run folder, with a snapshot of its own
        ]
        links = [name for name in folders if (here / name).is_symlink()]
        yield from (
            (here / name).relative_to(root)
            for name in (*links, *files)
            if not name.startswith(".") and not name.endswith(".pyc")
        )


def _checkout(here: Path) -> tuple[Path | None, bool]:
    """Root of the checkout around ``here``, and whether it has a commit; None where there is none, or no git."""
    command = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        return None, False
    root = os.fsdecode(done.stdout.partition(b"\n")[0])
    if not root and any((folder / ".git").exists() for folder in (here, *here.parents)):
        said = os.fsdecode(done.stderr).strip().splitlines()[0]
        raise UsageError(f"snapshot: git refuses the checkout around {here}: {said}; mend that, or use --no-snapshot.")
    return Path(root) if root else None, done.returncode == 0


def _git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True).stdout
