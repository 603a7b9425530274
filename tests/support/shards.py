"""Folders of small images, and tar files as webdataset and tar write them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_folders(root: Path, images: int, splits: Sequence[str] = ("train", "val")) -> None:
    """In each split, ``images`` JPEG and PNG files of different sizes in two class folders."""
    for split in splits:
        for number in range(images):
            label = number % 2
            folder = root / split / ("cat", "dog")[label]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (20 + number % 5, 24), (40 + 60 * label + number, 90, number))
            image.putpixel((3, 4), (255, 0, number))
            image.save(folder / f"{number:03d}.{('jpg', 'png')[number % 3 == 2]}")


def write_tar(path: Path, files: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT, how: str = "w") -> Path:
    """A tar file with the headers of ``webdataset.TarWriter``, or in another format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, how, format=tar_format) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(content), 0o444, 1.7e9
            member.uname, member.gname = "bigdata", "bigdata"
            tar.addfile(member, io.BytesIO(content))
    return path


def jpeg(shade: int = 90) -> bytes:
    """A small JPEG."""
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, shade, shade)).save(content, format="JPEG")
    return content.getvalue()
