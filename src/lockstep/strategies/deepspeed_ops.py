"""DeepSpeed's ops, which are compiled at first use: by one rank of each node, and only then loaded by all.

torch keeps them below TORCH_EXTENSIONS_DIR; where that is not set, each environment has a folder of its own in
~/.cache/torch_extensions, or the ops of one would be compiled anew for the other, and back again.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from jsonargparse import Namespace

from lockstep.core import UsageError, World
from lockstep.distributed import all_gather

log = logging.getLogger(__name__)


_OPTIMIZERS = {
    "DeepSpeedCPUAdam": "CPUAdamBuilder",
    "DeepSpeedCPUAdagrad": "CPUAdagradBuilder",
    "DeepSpeedCPULion": "CPULionBuilder",
    "FusedAdam": "FusedAdamBuilder",
    "FusedLamb": "FusedLambBuilder",
    "FusedLion": "FusedLionBuilder",
}
"""Builders of ``deepspeed.ops.op_builder``, by the class that loads what they build."""


@dataclass(frozen=True)
class Op:
    """An op that a config needs.

    Attributes:
        builder: Class in ``deepspeed.ops.op_builder``.
        reason: Key and value that need it.
        instead: What would not.
        packages: Debian's, with which it compiles.
    """

    builder: str
    reason: str
    instead: str
    packages: str = "g++"


def required_ops(config: Namespace) -> list[Op]:
    """The ops that a config needs."""
    ops = []
    if config.strategy == "deepspeed":
        for key in ("offload_optimizer", "offload_param"):
            if config.deepspeed[key] == "nvme":
                ops.append(Op("AsyncIOBuilder", f"deepspeed.{key}: 'nvme'", "use cpu", "g++ libaio-dev"))
    optimizer = str(config.get("model.init_args.optimizer"))
    package, _, name = optimizer.rpartition(".")
    if package.startswith("deepspeed.") and name in _OPTIMIZERS:
        ops.append(Op(_OPTIMIZERS[name], f"model.optimizer: {optimizer!r}", "use adamw or sgd"))
    return ops


def select_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed which kind of device it is for; to be called before it is imported."""
    if device.type != "cuda":
        os.environ["DS_ACCELERATOR"] = "cpu"


def load_ops(ops: Sequence[Op], world: World, device: torch.device) -> None:
    """Compile ``ops`` on the first rank of each node, if they are not yet, and load them on all; every rank must call.

    Raises:
        UsageError: On all ranks, if one of them cannot.
    """
    if not ops:
        return
    select_accelerator(device)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions" / _environment_id()))
    for is_first in (True, False):
        found: list[str] = []
        loading = Thread(target=lambda found=found: found.append(_load_all(ops)), daemon=True)
        if is_first == (world.local_rank == 0):
            loading.start()
        else:
            found.append("")
        # Asked again and again: compiling may take longer than a collective may wait.
        while None in (told := all_gather(found[0] if found else None, world)):
            time.sleep(0.2)
        for problem in filter(None, told):
            raise UsageError(problem)


def _environment_id() -> str:
    """A name for the torch and the DeepSpeed that are used here: what an op is compiled against."""
    facts = (torch.__version__, torch.__file__, str(import_module("deepspeed").__file__), platform.machine())
    return f"lockstep-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def _load_all(ops: Sequence[Op]) -> str:
    """Load ``ops``, compiling them if need be; the sentence about the first that does not load, else nothing."""
    return next(filter(None, map(_load, ops)), "")


def _load(op: Op) -> str:
    name = op.builder
    try:
        builder = getattr(import_module("deepspeed.ops.op_builder"), op.builder)()
        name = builder.name
        if not _is_installed(name):
            if missing := _missing_tool(builder):
                return (
                    f"{op.reason} needs DeepSpeed's op {name}, which is compiled at first use, and {missing} is missing on "
                    f"{platform.node()}; install it (apt-get install {op.packages}), or {op.instead}."
                )
            if not (Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name / f"{name}.so").exists():
                log.info("building %s, once for this node, which takes minutes: %s needs it", name, op.reason)
        builder.load(verbose=False)
        return ""
    except Exception as error:  # compilers fail in many ways
        log.error("%s cannot be loaded:\n%s", name, error)
        reason = next((line.strip() for line in str(error).splitlines() if "error:" in line), str(error).partition("\n")[0])
        return (
            f"{op.reason} needs DeepSpeed's op {name}, which cannot be compiled or loaded on {platform.node()} ({reason}); "
            f"the log says more, or {op.instead}."
        )


def _is_installed(name: str) -> bool:
    """Whether DeepSpeed itself was installed with the op compiled, for this kind of device."""
    about: Any = import_module("deepspeed.git_version_info")
    accelerator: Any = import_module("deepspeed.accelerator").get_accelerator()
    return bool(about.installed_ops.get(name)) and about.accelerator_name == accelerator._name


def _missing_tool(builder: Any) -> str:
    """What is not here of that which compiles; nothing if all of it is."""
    if shutil.which("ninja") is None:  # it is beside this Python, which need not be an activated environment's
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    # torch takes the first, DeepSpeed's own checks the second.
    compilers = os.environ.get("CXX", "c++"), os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    for program in ("ninja", *(shlex.split(compiler)[0] for compiler in compilers)):
        if shutil.which(program) is None:
            return program
    return "" if builder.is_compatible(verbose=False) or builder.name != "async_io" else "libaio"
