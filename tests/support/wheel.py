"""Build lockstep's distributions from a copy of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

from support.runs import REPO

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"

ENDINGS = {"wheel": "*.whl", "sdist": "*.tar.gz"}


def build(kind: str, folder: Path) -> Path:
    """Build the ``wheel`` or ``sdist`` into ``folder`` and return its path; nothing is written into the repository."""
    source = folder / "source"
    if not source.exists():
        for name in ("src", "configs", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPO / name, source / name, symlinks=True, ignore=ignored)
        for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
            shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob(ENDINGS[kind])
    return built
