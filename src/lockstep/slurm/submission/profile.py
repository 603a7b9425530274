"""What is special about one cluster: ``configs/cluster/NAME.yaml``, and the launcher's flags, which win over it.

No torch here: the launcher uses this room.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from lockstep.core import UsageError, did_you_mean

_MAX_MINUTES = 10 * 365 * 24 * 60
"""Minutes."""


_RESERVED_SBATCH = {
    "array": "; use --sweep", "chdir": "", "dependency": "; use --after", "error": "", "export": "; use environment",
    "job-name": "; use --job-name", "nodes": "; use --nodes", "ntasks": "; use --ranks-per-node",
    "ntasks-per-node": "; use --ranks-per-node", "cpus-per-task": "; use --cpus-per-rank", "open-mode": "", "output": "",
    "parsable": "", "signal": "", "test-only": "; use --dry-run", "wrap": "",
}  # fmt: skip
"""Arguments of sbatch that would break what the launcher does with its own, and what to use instead."""


_SECRET_NAME = re.compile(r"API_?KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


def profile_field(text: str, default: Any = None) -> Any:
    """A field that has ``text`` as its help."""
    if isinstance(default, tuple | dict):
        return field(default_factory=lambda: default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Container:
    """The image that the ranks run in; the run folder and the folder of submission are mounted at their own paths.

    Attributes:
        image: What ``--container-image`` of pyxis takes, or the file or address of an apptainer image.
        mounts: More folders, ``from:to``.
        runtime: ``pyxis`` (enroot, through srun) or ``apptainer``.
    """

    image: str
    mounts: tuple[str, ...] = ()
    runtime: Literal["pyxis", "apptainer"] = "pyxis"


@dataclass(frozen=True)
class Profile:
    """Resources of a job and the ways of a cluster. What is None is left to Slurm's own default."""

    partition: str | None = profile_field("partition, or several with commas")
    account: str | None = profile_field("account that is charged")
    qos: str | None = profile_field("quality of service")
    constraint: str | None = profile_field("features that the nodes must have")
    reservation: str | None = profile_field("reservation to run in")
    nodelist: str | None = profile_field("nodes to use")
    exclude: str | None = profile_field("nodes to leave out")
    time: str | None = profile_field("time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    gpus_per_node: int = profile_field("GPUs of each node", 0)
    gpu_memory: str | None = profile_field("memory of each GPU, such as 80G; --plan says what fits there")
    ranks_per_node: int | None = profile_field("ranks on each node (default: one per GPU, else 1)")
    cpus_per_gpu: int | None = profile_field("CPUs for each GPU, shared out to the ranks")
    cpus_per_rank: int | None = profile_field("CPUs for each rank; wins over cpus_per_gpu")
    mem: str | None = profile_field("memory of each node, such as 480G; 0 is all of it")
    exclusive: bool = profile_field("take whole nodes", False)
    mail_user: str | None = profile_field("who is written to")
    mail_type: str | None = profile_field("what about: BEGIN,END,FAIL …")
    sbatch: tuple[str, ...] = profile_field("any further argument of sbatch, --name=value; may be repeated", ())
    srun: tuple[str, ...] = profile_field("any further argument of srun, --name=value; may be repeated", ())
    modules: tuple[str, ...] = profile_field("environment modules to load", ())
    setup: tuple[str, ...] = profile_field("lines of shell, run on the first node before the ranks start", ())
    environment: dict[str, str] = profile_field("variables for the ranks, taken as they are", {})
    network_interface: str | None = profile_field(
        "interface of the network between nodes, for NCCL and gloo (ib0, ^docker0,lo …)"
    )
    container: Container | None = profile_field("image, mounts and runtime of a container")
    python: str | None = profile_field("the interpreter of the ranks (default: the launcher's own; in a container, python)")
    scratch: str | None = profile_field("folder on each node for temporary files; $VARIABLES of the job are filled in there")
    network: bool = profile_field("whether nodes reach the internet; if not, W&B is offline", True)
    shared_filesystem: bool = profile_field("whether nodes share the data's folder; if not, each prepares its own", True)

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def cpus(self) -> int | None:
        """CPUs of each rank; None where nobody said."""
        if self.cpus_per_rank is not None or self.cpus_per_gpu is None:
            return self.cpus_per_rank
        return max(1, self.cpus_per_gpu * self.gpus_per_node // self.ranks)

    @property
    def minutes(self) -> int | None:
        """The time limit in minutes, rounded up, as Slurm counts it."""
        return None if self.time is None else parse_minutes(self.time)


_UNITS = "KMGT"


PROFILE_FLAGS = tuple(f.name for f in fields(Profile) if f.type in (int, int | None, str | None))
"""Fields that are flags of the launcher too: all that are one text or number."""


def parse_minutes(time: str) -> int:
    """Minutes in a time as Slurm writes it, rounded up.

    Raises:
        UsageError: It is no such time.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UsageError(f"time: {time!r} is no time; write minutes, HH:MM:SS or D-HH:MM:SS, such as 24:00:00.")
    days, *rest = match.groups()
    given = [int(part) for part in rest if part is not None]
    if days is not None:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, mins, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, mins, seconds = given
    else:  # MM or MM:SS
        hours, mins, seconds = 0, *[*given, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + (1 if seconds else 0)


def parse_size(size: str) -> int:
    """Bytes in a size as Slurm writes it: a number, in MiB or with K, M, G or T behind it.

    Raises:
        UsageError: It is no such size.
    """
    match = re.fullmatch(rf"(\d+)([{_UNITS}]?)B?", size.upper())
    if not match:
        raise UsageError(f"{size!r} is no size; write a number with K, M, G or T behind it, such as 80G.")
    return int(match[1]) << 10 * (1 + _UNITS.index(match[2] or "M"))


def load_profile(name: str | None, env: Mapping[str, str], folders: Iterable[Path]) -> Profile:
    """The profile called ``name``, or the one in ``LOCKSTEP_PROFILE``, or one that says nothing.

    Args:
        name: A name, or the path of a file (with a / or .yaml in it).
        env: Environment of the launcher.
        folders: Where names are looked for, the first hit counts.

    Raises:
        UsageError: There is no such profile, or one of its keys or values is wrong.
    """
    name = name or env.get("LOCKSTEP_PROFILE")
    if not name:
        return Profile()
    folders = list(folders)
    if "/" in name or name.endswith(".yaml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"profile: there is no file {path}.")
    else:
        found = [folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()]
        if not found:
            known = {file.stem for folder in folders for file in folder.glob("*.yaml")}
            hint = did_you_mean(name, known) if known else "."
            raise UsageError(f"profile: there is no {name!r} in {' or '.join(map(str, folders))}{hint}")
        path = found[0]
    try:
        # Everything as text: YAML would make 86400 of 24:00:00, and true of a variable's "yes".
        content = yaml.load(path.read_text(), yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"profile: {path} is no valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"profile: {path} must hold keys with values.")
    profile: Profile = _validated(Profile, content, str(path))
    return profile


def apply_flags(base: Profile, flags: Mapping[str, Any]) -> Profile:
    """``base`` with the flags that were given (not None); lists are added to, everything else is replaced."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("sbatch", "srun"):
        given[name] = (*getattr(base, name), *given.get(name, ()))
    changed = replace(base, **given)
    profile: Profile = _validated(Profile, {f.name: getattr(changed, f.name) for f in fields(changed)}, "")
    return profile


def _validated(cls: Any, content: Mapping[Any, Any], where: str) -> Any:
    """``content`` as ``cls``, every value of the right type."""
    place = f"{where}: " if where else ""
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"{place}{key}: a profile has no such key{did_you_mean(str(key), known)}")
        values[key] = _convert(f"{place}{key}", value, hints[key])
    if missing := [name for name in ("image",) if name in known and name not in values]:
        raise UsageError(f"{place}{missing[0]}: must be set.")
    made = cls(**values)
    if isinstance(made, Profile):
        _check_values(made, place)
    return made


def _convert(key: str, value: Any, hint: Any) -> Any:
    choices = get_args(hint)
    if type(None) in choices and (value is None or value in ("", "null", "~")):
        return None
    if Container in choices:
        if isinstance(value, Container):
            return value
        if isinstance(value, str):
            value = {"image": value}
        if isinstance(value, Mapping):
            return _validated(Container, value, key)
        raise UsageError(f"{key}: {value!r} must be an image, or keys image, mounts and runtime.")
    if "pyxis" in choices and value not in choices:
        raise UsageError(f"{key}: {value!r} is not valid{did_you_mean(str(value), choices)}")
    if hint == dict[str, str]:
        if not isinstance(value, Mapping) or not all(re.fullmatch(r"[A-Za-z_]\w*", str(name)) for name in value):
            raise UsageError(f"{key}: {value!r} must be variables with values, such as {{NCCL_DEBUG: WARN}}.")
        if wrong := [name for name, item in value.items() if isinstance(item, Mapping | list)]:
            raise UsageError(f"{key}.{wrong[0]}: {value[wrong[0]]!r} must be a text.")
        return {str(name): str(item) for name, item in value.items()}
    if hint == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise UsageError(f"{key}: {value!r} must be a list of texts.")
        return tuple(map(str, items))
    if hint is bool:
        if str(value).lower() not in ("true", "false"):
            raise UsageError(f"{key}: {value!r} must be true or false.")
        return str(value).lower() == "true"
    if hint is int or int in choices:
        if not re.fullmatch(r"\d+", str(value)):
            raise UsageError(f"{key}: {value!r} must be a whole number.")
        return int(value)
    if isinstance(value, Mapping | list) or "\n" in str(value):
        raise UsageError(f"{key}: {value!r} must be a text of one line.")
    return str(value)


def _check_values(profile: Profile, place: str) -> None:
    if profile.time is not None:
        try:
            asked = parse_minutes(profile.time)
        except UsageError as error:
            raise UsageError(f"{place}{error.message}") from None
        if not 0 < asked < _MAX_MINUTES:
            raise UsageError(f"{place}time: {profile.time!r} must be more than 0, and less than ten years.")
    for name in ("gpu_memory", "mem"):
        if (size := getattr(profile, name)) is not None:
            try:
                if not parse_size(size) and name == "gpu_memory":
                    raise UsageError(f"{size!r} must be more than 0.")
            except UsageError as error:
                raise UsageError(f"{place}{name}: {error.message}") from None
    for mount in profile.container.mounts if profile.container else ():
        if ":" not in mount:
            raise UsageError(f"{place}container.mounts: {mount!r} must be of the form from:to.")
    for name in ("ranks_per_node", "cpus_per_rank", "cpus_per_gpu"):
        if getattr(profile, name) == 0:
            raise UsageError(f"{place}{name}: 0 must be 1 or more.")
    for name in ("sbatch", "srun"):
        for argument in getattr(profile, name):
            if not re.fullmatch(r"--[a-z][\w-]*(=.*)?", argument) or "\n" in argument:
                raise UsageError(f"{place}{name}: {argument!r} must be one line of the form --name or --name=value.")
            if name == "sbatch" and (owned := argument[2:].partition("=")[0]) in _RESERVED_SBATCH:
                raise UsageError(f"{place}sbatch: {argument!r}: {owned} belongs to the launcher{_RESERVED_SBATCH[owned]}.")
            if name == "sbatch" and re.match(r"--clusters?(=|$)", argument):
                raise UsageError(f"{place}sbatch: {argument!r} leads to another cluster; submit on its own login node.")
    if profile.scratch is not None and not re.fullmatch(r"[\w./${}@+-]+", profile.scratch):
        raise UsageError(
            f"{place}scratch: {profile.scratch!r} must be a path of letters, digits and . _ - + @, with $VARIABLES."
        )
    in_setup = [name for line in profile.setup for name in re.findall(r"(\w+)=", line)]
    for name in (*profile.environment, *in_setup):
        if _SECRET_NAME.search(name):
            where = "environment" if name in profile.environment else "setup"
            raise UsageError(
                f"{place}{where}.{name}: a secret does not belong into a profile, it would be written into every job's "
                "script; export it in the shell that submits, or keep it where its own tool does (wandb login)."
            )


def profile_folders(env: Mapping[str, str], here: Path, toolkit: Path) -> list[Path]:
    """Where profiles are looked for: the current folder, the user's own configuration, the toolkit's examples."""
    own = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", os.sep)) / ".config")
    return list(dict.fromkeys((here / "configs" / "cluster", own / "lockstep" / "cluster", toolkit / "configs" / "cluster")))
