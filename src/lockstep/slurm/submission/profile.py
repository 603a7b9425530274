"""Profiles describe one cluster: ``configs/cluster/NAME.yaml``, overridden by the launcher's flags."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from lockstep.config import SHIPPED
from lockstep.core import UsageError, did_you_mean, is_secret

_MAX_MINUTES = 10 * 365 * 24 * 60

_RESERVED_SBATCH = {
    "array": "; use --sweep", "chdir": "", "dependency": "; use --after", "error": "", "export": "; use environment",
    "job-name": "; use --job-name", "nodes": "; use --nodes", "ntasks": "; use --ranks-per-node",
    "ntasks-per-node": "; use --ranks-per-node", "cpus-per-task": "; use --cpus-per-rank", "open-mode": "", "output": "",
    "parsable": "", "signal": "", "test-only": "; use --dry-run", "wrap": "",
}  # fmt: skip
"""Arguments of sbatch that the launcher sets itself, and the flag to use instead."""

_PER_TASK = {"gpus-per-task", "gpu-bind", "ntasks-per-gpu", "tres-per-task", "tres-bind"}
"""Arguments of sbatch and srun that divide GPUs among tasks: a node has one, whose ranks share its GPUs."""

_HETEROGENEOUS = "heterogeneous jobs are not supported: all nodes of a run have the same number of ranks; ask for equal nodes"

_RESERVED_SRUN = {"ntasks", "ntasks-per-node", "cpus-per-task", "nodes", "output", "kill-on-bad-exit"}

_ASSIGNMENT = re.compile(
    r"\b([A-Za-z_]\w*)=[\"']?([^\s,;\"']*)|--(password|passwd|secret|token|api-?key|access-?key)[= ]+(\S+)"
)
"""An assignment in a shell line, also inside another assignment, or an option that gives a program a secret."""

_SIZE_UNITS = "KMGT"


def profile_field(text: str, default: Any = None) -> Any:
    """A field with ``text`` as the help of its flag."""
    return field(default_factory=lambda: default, metadata={"help": text})


@dataclass(frozen=True)
class Container:
    """The image that the ranks run in; the run folder and the working directory are mounted at their own paths.

    Attributes:
        image: A value of ``--container-image`` for pyxis, or the file or address of an apptainer image.
        mounts: Additional folders to mount, ``from:to``.
        runtime: ``pyxis`` (enroot, through srun) or ``apptainer``.
    """

    image: str
    mounts: tuple[str, ...] = ()
    runtime: Literal["pyxis", "apptainer"] = "pyxis"


@dataclass(frozen=True)
class Profile:
    """Resources of a job and the properties of a cluster; None leaves a value to Slurm."""

    partition: str | None = profile_field("partition, or several separated by commas")
    account: str | None = profile_field("account to charge")
    qos: str | None = profile_field("quality of service")
    constraint: str | None = profile_field("features that the nodes must have")
    reservation: str | None = profile_field("reservation to run in")
    nodelist: str | None = profile_field("nodes to use")
    exclude: str | None = profile_field("nodes not to use")
    time: str | None = profile_field("time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    gpus_per_node: int = profile_field("GPUs per node", 0)
    gpu_memory: str | None = profile_field("memory of a GPU, such as 80G, for --plan")
    ranks_per_node: int | None = profile_field("ranks per node (default: one per GPU, or 1 without GPUs)")
    cpus_per_gpu: int | None = profile_field("CPUs per GPU, divided among the ranks")
    cpus_per_rank: int | None = profile_field("CPUs per rank; overrides cpus_per_gpu")
    mem: str | None = profile_field("memory per node, such as 480G; 0 requests all of it")
    exclusive: bool = profile_field("request whole nodes", False)
    mail_user: str | None = profile_field("mail address for notifications")
    mail_type: str | None = profile_field("events to send mail for, such as BEGIN,END,FAIL")
    sbatch: tuple[str, ...] = profile_field("additional argument of sbatch, --name=value; repeatable", ())
    srun: tuple[str, ...] = profile_field("additional argument of srun, --name=value; repeatable", ())
    modules: tuple[str, ...] = profile_field("environment modules to load", ())
    setup: tuple[str, ...] = profile_field("shell lines to run on the first node before the ranks start", ())
    environment: dict[str, str] = profile_field("environment variables of the ranks; values are not expanded", {})
    network_interface: str | None = profile_field("interface between nodes for NCCL and gloo (ib0, ^docker0,lo …)")
    container: Container | None = profile_field("image, mounts and runtime of a container")
    python: str | None = profile_field("Python interpreter of the ranks (default: the launcher's; in a container, python)")
    scratch: str | None = profile_field("folder for temporary files on each node; $VARIABLES of the job are expanded there")
    network: bool = profile_field("whether nodes reach the internet; if not, W&B runs offline", True)
    shared_filesystem: bool = profile_field("whether nodes share the data folder; if not, each prepares its own data", True)

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def cpus(self) -> int | None:
        """CPUs per rank; None leaves it to Slurm."""
        if self.cpus_per_rank is not None or self.cpus_per_gpu is None:
            return self.cpus_per_rank
        return max(1, self.cpus_per_gpu * self.gpus_per_node // self.ranks)

    @property
    def minutes(self) -> int | None:
        """Time limit in minutes, rounded up, as Slurm counts it."""
        return None if self.time is None else parse_minutes(self.time)

    def check_python(self) -> None:
        """Raise UsageError if the interpreter is a path that does not exist here and that no setup of the job can create."""
        if self.python is None or self.container is not None or self.modules or self.setup:
            return
        if "/" in self.python and not os.access(self.python, os.X_OK):
            raise UsageError(
                f"python: {self.python} is not a program here; give the path of an interpreter, or, if the job creates it, "
                "add the lines that do so to setup in the profile."
            )

    def non_default_values(self) -> dict[str, Any]:
        """The fields that differ from those of an empty profile; of the environment only its names."""
        values = {name: value for name, value in vars(self).items() if value != vars(Profile())[name]}
        return values | ({"environment": list(self.environment)} if self.environment else {})


PROFILE_FLAGS: dict[str, type] = {
    f.name: str if f.type == str | None else int for f in fields(Profile) if f.type in (int, int | None, str | None)
}
"""Fields that are also flags of the launcher, those of one text or number, and the type of their value."""


def check_heterogeneous(arguments: Sequence[str]) -> None:
    """Raise UsageError if the arguments of a launcher ask for a heterogeneous job in the syntax of sbatch."""
    for argument in arguments:
        if argument == ":" or argument.partition("=")[0] == "--het-group":
            raise UsageError(f"{argument!r}: {_HETEROGENEOUS}.")


def parse_minutes(time: str, key: str = "time") -> int:
    """Parse a time as Slurm writes it, the value of ``key``, in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UsageError(f"{key}: {time!r} is not a time; write minutes, HH:MM:SS or D-HH:MM:SS, such as 24:00:00.")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:  # MM; with days HH, HH:MM or HH:MM:SS
        parts.insert(0, 0)
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + (1 if seconds else 0)


def parse_size(size: str, key: str = "mem") -> int:
    """Parse a size as Slurm writes it, the value of ``key``, in bytes: a number of MiB, or one with the suffix K, M, G or T."""
    match = re.fullmatch(rf"(\d+)([{_SIZE_UNITS}]?)B?", size.upper())
    if not match:
        raise UsageError(f"{key}: {size!r} is not a size; write a number with the suffix K, M, G or T, such as 80G.")
    return int(match[1]) << 10 * (1 + _SIZE_UNITS.index(match[2] or "M"))


def load_profile(name: str | None, env: Mapping[str, str], folders: Iterable[Path]) -> Profile:
    """Load the profile ``name``, or the one named by ``LOCKSTEP_PROFILE``; without either, return an empty one.

    Args:
        name: A name, or the path of a file (with a / or .yaml in it).
        folders: Where to look for names; the first match wins.
    """
    name = name or env.get("LOCKSTEP_PROFILE")
    if not name:
        return Profile()
    path = _profile_path(name, list(folders))
    try:
        # All values as strings: YAML parses 24:00:00 as 86400 and yes as true.
        content = yaml.load(path.read_text(), yaml.BaseLoader) or {}
    except OSError as error:
        raise UsageError(f"profile: {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"profile: {path} is not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"profile: {path}: expected a mapping, got {content!r}.")
    return make_profile(content, f"{path}: ")


def _profile_path(name: str, folders: list[Path]) -> Path:
    if "/" in name or name.endswith(".yaml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"profile: the file {path} does not exist.")
        return path
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    known = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    raise UsageError(f"profile: {name!r} is not in {' or '.join(map(str, folders))}{did_you_mean(name, known)}")


def apply_flags(base: Profile, flags: Mapping[str, Any]) -> Profile:
    """Return ``base`` with the flags that are not None: they extend lists and replace everything else."""
    values = dict(vars(base))
    for name, value in flags.items():
        if value is not None:
            values[name] = (*values[name], *value) if name in ("sbatch", "srun") else value
    return make_profile(values)


def make_profile(content: Mapping[Any, Any], place: str = "") -> Profile:
    """Build a profile from its values, converted and checked; ``place`` begins an error message."""
    profile = Profile(**_convert_fields(Profile, content, place))
    _check_values(profile, place)
    return profile


def _convert_fields(cls: type[Profile | Container], content: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """``content`` with each value as the type of its field of ``cls``."""
    hints = get_type_hints(cls)
    for key in content:
        if key not in hints:
            raise UsageError(f"{place}{key}: unknown key{did_you_mean(str(key), hints)}")
    return {key: _convert(f"{place}{key}", value, hints[key]) for key, value in content.items()}


def _convert(key: str, value: Any, hint: Any) -> Any:
    choices = get_args(hint)
    if type(None) in choices and value in (None, "", "null", "~"):
        return None
    if Container in choices:
        return _convert_container(key, value)
    if "pyxis" in choices and value not in choices:
        raise UsageError(f"{key}: {value!r} is not valid{did_you_mean(str(value), choices)}")
    if hint == dict[str, str]:
        if not isinstance(value, Mapping) or not all(re.fullmatch(r"[A-Za-z_]\w*", str(name)) for name in value):
            raise UsageError(f"{key}: {value!r} must be variables with values, such as {{NCCL_DEBUG: WARN}}.")
        return {str(name): _convert_text(f"{key}.{name}", item) for name, item in value.items()}
    if hint == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise UsageError(f"{key}: {value!r} must be a list of texts.")
        return tuple(items)
    if hint is bool:
        if str(value).lower() not in ("true", "false"):
            raise UsageError(f"{key}: {value!r} must be true or false.")
        return str(value).lower() == "true"
    if hint is int or int in choices:
        if not re.fullmatch(r"\d+", str(value)):
            raise UsageError(f"{key}: {value!r} must be a whole number.")
        return int(value)
    if "\n" in str(value):
        raise UsageError(f"{key}: {value!r} must be a text of one line.")
    text = _convert_text(key, value)
    return os.path.expanduser(text) if text.startswith("~/") else text


def _convert_text(key: str, value: Any) -> str:
    if isinstance(value, Mapping | list):
        raise UsageError(f"{key}: {value!r} must be a text.")
    return str(value)


def _convert_container(key: str, value: Any) -> Container:
    if isinstance(value, Container):
        return value
    content = {"image": value} if isinstance(value, str) else value
    if not isinstance(content, Mapping):
        raise UsageError(f"{key}: {value!r} must be an image, or a mapping with image, mounts and runtime.")
    if "image" not in content:
        raise UsageError(f"{key}.image: must be set.")
    return Container(**_convert_fields(Container, content, f"{key}."))


def _check_values(profile: Profile, place: str) -> None:
    if profile.time is not None:
        _check_time(profile.time, f"{place}time")
    if profile.mem is not None:
        parse_size(profile.mem, f"{place}mem")
    if profile.gpu_memory is not None and not parse_size(profile.gpu_memory, f"{place}gpu_memory"):
        raise UsageError(f"{place}gpu_memory: {profile.gpu_memory!r} must be more than 0.")
    for mount in profile.container.mounts if profile.container else ():
        if ":" not in mount:
            raise UsageError(f"{place}container.mounts: {mount!r} must be of the form from:to.")
    for name in ("ranks_per_node", "cpus_per_rank", "cpus_per_gpu"):
        if getattr(profile, name) == 0:
            raise UsageError(f"{place}{name}: 0 must be 1 or more.")
    for name in ("sbatch", "srun", "setup"):
        for argument in getattr(profile, name):
            if re.match(r"\s*(#SBATCH\s+)?(hetjob|packjob|:)\s*$", argument):
                raise UsageError(f"{place}{name}: {argument!r}: {_HETEROGENEOUS}.")
            if re.match(r"\s*#SBATCH\b", argument):
                raise UsageError(
                    f"{place}{name}: {argument!r} is a comment to the shell; write --name=value into sbatch of the profile."
                )
    for name, reserved in (("sbatch", {*_RESERVED_SBATCH}), ("srun", _RESERVED_SRUN)):
        for argument in getattr(profile, name):
            if not re.fullmatch(r"--[a-z][\w-]*(=.*)?", argument) or "\n" in argument:
                raise UsageError(f"{place}{name}: {argument!r} must be one line of the form --name or --name=value.")
            flag = argument[2:].partition("=")[0]
            if flag == "het-group":
                raise UsageError(f"{place}{name}: {argument!r}: {_HETEROGENEOUS}.")
            if flag in _PER_TASK:
                raise UsageError(
                    f"{place}{name}: {argument!r} is for tasks, and Slurm starts one task per node, whose ranks share the GPUs "
                    "of the node; use gpus_per_node."
                )
            if flag in reserved:
                raise UsageError(
                    f"{place}{name}: {argument!r}: the launcher sets {flag} itself{_RESERVED_SBATCH.get(flag, '')}."
                )
            if name == "sbatch" and flag in ("cluster", "clusters"):
                raise UsageError(f"{place}sbatch: {argument!r} selects another cluster; submit on its login node.")
    if profile.scratch is not None and not re.fullmatch(r"[\w./${}@+-]+", profile.scratch):
        raise UsageError(f"{place}scratch: {profile.scratch!r} must be a path of letters, digits, . _ - + @ and $VARIABLES.")
    _check_secrets(profile, place)


def _check_time(time: str, key: str) -> None:
    """Raise UsageError for a time that is ambiguous, not a time of a clock, or out of range."""
    if re.fullmatch(r"\d+:\d+", time):
        reading = f"Slurm reads minutes and seconds; write {time}:00 for hours, or {time.partition(':')[0]} for minutes"
        raise UsageError(f"{key}: {time!r} is ambiguous: {reading}.")
    days, _, clock = time.rpartition("-")
    hours, *rest = clock.split(":")
    if (days and hours.isdigit() and int(hours) > 23) or any(part.isdigit() and int(part) > 59 for part in rest):
        raise UsageError(f"{key}: {time!r} is not a time; minutes and seconds go to 59, and hours after days to 23.")
    if not 0 < parse_minutes(time, key) < _MAX_MINUTES:
        raise UsageError(f"{key}: {time!r} must be more than 0, and less than ten years.")


def _check_secrets(profile: Profile, place: str) -> None:
    """Raise UsageError if a value looks like a secret: a profile is a file that others read, as they read a batch script."""
    container = profile.container
    lines = {"setup": profile.setup, "sbatch": profile.sbatch, "srun": profile.srun, "modules": profile.modules}
    texts = {"container": (container.image, *container.mounts) if container else (), **lines}
    found = [
        (f"{key}.{name or option.replace('-', '_')}", value or secret)
        for key in texts
        for line in texts[key]
        for name, value, option, secret in _ASSIGNMENT.findall(line)
    ]
    found += [(key, line) for key in texts for line in texts[key]]
    found += [(f"environment.{name}", value) for name, value in profile.environment.items()]
    for name, value in found:
        if is_secret(name, value):
            raise UsageError(
                f"{place}{name}: a secret must not be in a profile, which is copied and shown; export it in the shell that "
                "submits, or log in with the service's own tool (wandb login)."
            )


def profile_folders(env: Mapping[str, str], project: Path) -> list[Path]:
    """Where to look for profiles: the project, the user's own configuration, the shipped examples."""
    own = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", os.sep)) / ".config")
    return list(dict.fromkeys((project / "configs" / "cluster", own / "lockstep" / "cluster", SHIPPED / "cluster")))
