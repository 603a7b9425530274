"""Compile the DeepSpeed ops that a config needs: on one rank of each node, before all ranks load them.

torch keeps compiled ops in TORCH_EXTENSIONS_DIR. If it is not set, they are in ~/.cache/torch_extensions, and all environments
with the same versions share them.
"""

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from jsonargparse import Namespace

from lockstep.compat import patch, private
from lockstep.compat.deepspeed import merge_async_io_sources, needs_nvcc
from lockstep.config import check_offload
from lockstep.core import UsageError, World, atomic_write_text
from lockstep.distributed import all_gather

log = logging.getLogger(__name__)

_OPTIMIZERS = ("DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedAdam", "FusedLamb", "FusedLion")
"""The optimizers that load an op."""

_BUILD_RECORD = "lockstep-build"
"""A file beside a compiled op that holds the build id under which it was compiled and loaded."""


@dataclass(frozen=True)
class Op:
    """An op that a config needs.

    Attributes:
        builder: Name of its class in ``deepspeed.ops.op_builder``.
        key, value: The config entry that needs it.
        remedy: How to do without it, for messages.
        packages: Debian packages that are needed to compile it.
    """

    builder: str
    key: str
    value: str
    remedy: str
    packages: str = "g++"

    @property
    def reason(self) -> str:
        """Key and value, as messages show them."""
        return f"{self.key}: {self.value!r}"


def required_ops(config: Namespace) -> list[Op]:
    """The ops that a config needs; UsageError if its options for offload contradict each other."""
    ops = []
    if config.strategy == "deepspeed":
        check_offload(config.deepspeed)
        for key in ("offload_optimizer", "offload_param"):
            if config.deepspeed[key] == "nvme":
                ops.append(Op("AsyncIOBuilder", f"deepspeed.{key}", "nvme", "use cpu", "g++ libaio-dev"))
    optimizer = str(config.get("model.init_args.optimizer"))
    package, _, name = optimizer.rpartition(".")
    if package.startswith("deepspeed.") and name in _OPTIMIZERS:
        ops.append(Op(f"{name.removeprefix('DeepSpeed')}Builder", "model.optimizer", optimizer, "use adamw or sgd"))
    return ops


def select_accelerator(device: torch.device) -> None:
    """Select the kind of device that DeepSpeed uses; must be called before DeepSpeed is imported."""
    if device.type != "cuda":
        os.environ["DS_ACCELERATOR"] = "cpu"


def load_ops(ops: Sequence[Op], world: World, device: torch.device) -> None:
    """Load ``ops`` on all ranks; the first rank of each node compiles them if necessary. Every rank must call.

    Raises:
        UsageError: On all ranks, if one of them cannot load them.
    """
    if not ops:
        return
    select_accelerator(device)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions" / _build_id()))
    _share_compiled_ops()
    for first_rank_loads in (True, False):
        own = [] if first_rank_loads == (world.local_rank == 0) else [""]
        if not own:
            Thread(target=lambda own=own: own.append(next(filter(None, map(_load, ops)), "")), daemon=True).start()
        # Poll, because compiling may take longer than the timeout of a collective.
        while None in (problems := all_gather(own[0] if own else None, world)):
            time.sleep(0.2)
        for problem in filter(None, problems):
            raise UsageError(problem)


def _build_id() -> str:
    """Hash of everything that affects the machine code of an op: versions, ABI, and the processor (-march=native)."""
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^(flags|Features).*", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    facts = (
        *(torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi(), import_module("deepspeed").__version__),
        *(sysconfig.get_config_var("EXT_SUFFIX"), platform.machine(), flags and flags[0]),
        *(torch.cuda.get_device_capability() if torch.cuda.is_available() else ()),
    )
    return f"lockstep-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def _library(name: str) -> Path:
    return Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name / f"{name}.so"


def _is_compiled(name: str) -> bool:
    record = _library(name).with_name(_BUILD_RECORD)
    return _library(name).exists() and record.exists() and record.read_text() == _build_id()


@cache
def _share_compiled_ops() -> None:
    """Load an op that any environment has compiled under this build id.

    torch alone compiles it again in every environment, because the paths of the sources are part of its build rules.
    """
    builder_class: Any = import_module("deepspeed.ops.op_builder.builder").OpBuilder
    compile_and_load, loaded = builder_class.jit_load, private("deepspeed", builder_class, "_loaded_ops")

    def jit_load(builder: Any, verbose: bool = True) -> Any:
        name, record = builder.name, _library(builder.name).with_name(_BUILD_RECORD)
        if not _is_compiled(name):
            record.unlink(missing_ok=True)
            if name == "async_io":
                merge_async_io_sources(builder, record.with_name("sources"))
            module = compile_and_load(builder, verbose)
            atomic_write_text(record, _build_id())
            return module
        spec = spec_from_file_location(name, _library(name))
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded[name] = module
        return module

    patch("deepspeed", builder_class, "jit_load", jit_load)


def _load(op: Op) -> str:
    """Load ``op`` and return an empty string, or why it cannot be loaded."""
    name = op.builder
    try:
        builder = getattr(import_module("deepspeed.ops.op_builder"), op.builder)()
        name = builder.name
        if not _is_installed(name) and not _is_compiled(name):
            if missing := _missing_tool(builder):
                how = f"the CUDA toolkit {torch.version.cuda}" if missing == "nvcc" else f"it (apt-get install {op.packages})"
                return (
                    f"{op.reason} needs DeepSpeed's op {name}, which is compiled at first use, and {missing} is missing on "
                    f"{platform.node()}; install {how}, or {op.remedy}."
                )
            if not _library(name).exists():
                log.info("compiling %s for this node, which takes minutes: %s needs it", name, op.reason)
        builder.load(verbose=False)
        return ""
    except Exception as error:  # compilers and linkers may fail in any way
        log.error("%s cannot be loaded:\n%s", name, error)
        reason = next((line.strip() for line in str(error).splitlines() if "error:" in line), str(error).partition("\n")[0])
        return (
            f"{op.reason} needs DeepSpeed's op {name}, which cannot be compiled or loaded on {platform.node()} ({reason}); "
            f"see the log, or {op.remedy}."
        )


def _is_installed(name: str) -> bool:
    """Whether DeepSpeed was installed with the op precompiled for this kind of device."""
    build: Any = import_module("deepspeed.git_version_info")
    device = import_module("deepspeed.accelerator").get_accelerator().device_name()
    return bool(build.installed_ops.get(name)) and build.accelerator_name == device


def _missing_tool(builder: Any) -> str:
    """The first tool or library for compiling that is missing; an empty string if none is."""
    if shutil.which("ninja") is None:  # pip installs it beside Python, which is in PATH only in an activated environment
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    # torch uses the first, DeepSpeed's own checks use the second.
    compilers = os.environ.get("CXX", "c++"), os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    for program in ("ninja", *(shlex.split(compiler)[0] for compiler in compilers)):
        if shutil.which(program) is None:
            return program
    if needs_nvcc(builder):
        return "nvcc"
    return "" if builder.is_compatible(verbose=False) or builder.name != "async_io" else "libaio"
