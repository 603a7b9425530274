"""Sources to pack: a folder of images in class folders, or a map-style dataset."""

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lockstep.core import UsageError
from lockstep.data import FoundImages, list_images, printable
from lockstep.data.packed import explain
from lockstep.pack.fields import encode_sample
from lockstep.pack.images import ImageOptions


class LeftOut(Exception):
    """A sample that cannot be packed, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


class Source(Protocol):
    """Samples to be packed.

    Attributes:
        description: Identifies the source; a folder holds shards of one description only.
        classes: Names of the classes, if they are known.
        left_out: Names of files that are not samples, and why.
        encodes: Whether it encodes its samples with any options.
    """

    encodes: bool
    description: Mapping[str, Any]
    classes: list[str] | None
    left_out: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def fields(self, index: int, options: ImageOptions) -> dict[str, bytes]:
        """The content of the fields of a sample, by their names; raise LeftOut if it cannot be packed."""


class FolderSource:
    """The images in ``folder``, which has one folder for each class, in the order of ``lockstep.data.ImageFolder``.

    Raises:
        UsageError: The folder cannot be read, has no classes, or a class has no image.
    """

    encodes = False

    def __init__(self, folder: Path) -> None:
        found: FoundImages = list_images(folder)
        self._folder, self._files = folder, found.files
        self.classes: list[str] | None = [printable(name) for name in found.classes]
        self.left_out = [(printable(name), "not a .jpg, .jpeg or .png file of a class") for name in found.others]
        names = hashlib.sha256()
        for name, label in found.files:
            names.update(os.fsencode(name) + b"\0%d\n" % label)
        self.description: Mapping[str, Any] = {
            "folder": printable(os.path.realpath(folder)),
            "images": len(found.files),
            "names_sha256": names.hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._files)

    def fields(self, index: int, options: ImageOptions) -> dict[str, bytes]:
        """The image, and its label as ``cls``."""
        name, label = self._files[index]
        suffix = "png" if name.lower().endswith(".png") else "jpg"
        try:
            field_name, content = options.store_file(Path(self._folder, name).read_bytes(), suffix)
        except OSError as error:
            raise LeftOut(printable(name), f"cannot be read ({error.strerror})") from error
        except (RuntimeError, ValueError) as error:
            raise LeftOut(printable(name), f"cannot be decoded ({explain(error)})") from error
        return {field_name: content, "cls": b"%d" % label}


@dataclass
class DatasetSource:
    """The samples of a map-style dataset.

    Args:
        dataset: An object with a length and indexed samples.
        arguments: Its class and arguments.

    Raises:
        UsageError: It is not a map-style dataset.
    """

    dataset: Any
    arguments: Mapping[str, Any]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    encodes: bool = True

    def __post_init__(self) -> None:
        name = type(self.dataset).__name__
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            raise UsageError(f"--dataset: {name} has no __len__ or no __getitem__; give a map-style dataset.")
        self._name, self._length = name, len(self.dataset)
        known = getattr(self.dataset, "classes", None)
        is_list = isinstance(known, list | tuple) and all(isinstance(each, str) for each in known)
        self.classes: list[str] | None = list(known) if known and is_list else None
        self.description: Mapping[str, Any] = {"dataset": self.arguments, "samples": self._length}

    def __len__(self) -> int:
        return self._length

    def fields(self, index: int, options: ImageOptions) -> dict[str, bytes]:
        """The fields of a sample; its random numbers depend on ``index`` only."""
        torch.default_generator.manual_seed(index)
        np.random.seed(index % 2**32)
        random.seed(index)
        try:
            return encode_sample(self.dataset[index], options)
        except Exception as error:  # a user's class may raise anything
            raise LeftOut(f"{self._name}[{index}]", f"{type(error).__name__}: {explain(error)}") from error
