"""A chain of jobs: a training and the jobs that use its newest checkpoint, each after the one before has finished."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.config import COMMANDS, check_export_format
from lockstep.core import CommandLineParser, UsageError, did_you_mean
from lockstep.runs import LaunchRecord, new_run_id
from lockstep.slurm import Dependency, SubmittedJob
from lockstep.slurm.submission.options import NodeRange
from lockstep.slurm.submission.profile import Profile
from lockstep.slurm.submission.sbatch import Trial, release_job
from lockstep.slurm.submission.submission import Queued, Submission, register

LINK_COMMANDS = (*COMMANDS, "export")

_OWN_KEYS = {
    "ckpt_path": "a link uses the newest checkpoint of the run before",
    "run.name": "a link takes that of the training",
    "run.root": "a link takes that of the training",
}
"""Keys that a link cannot set, and why."""


class Link(NamedTuple):
    """A value of ``--then``.

    Attributes:
        text: As it was typed.
        command: One of ``LINK_COMMANDS``.
        keys: Keys of the config, which come after those of the training; of an export, its flags.
        profile: Resources.
    """

    text: str
    command: str
    keys: tuple[str, ...]
    profile: Profile
    nodes: NodeRange
    job_name: str | None = None


class Chain(NamedTuple):
    """A training and the submissions that follow it, with the text of each as it was typed."""

    training: Submission
    links: tuple[Submission, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def create(
        cls, training: Submission, links: Sequence[Link], env: Mapping[str, str], launcher_flags: Sequence[str] = ()
    ) -> "Chain":
        """Check all links like runs of their own, except that their checkpoint does not exist yet.

        Raises:
            UsageError: A link is wrong, or the training leaves no checkpoint for it.
        """
        if links and training.command != "fit":
            raise UsageError(
                f"--then: {training.command} leaves no checkpoint for {links[0].command}; begin with a training, or submit "
                f"{links[0].command} with --after and --ckpt_path."
            )
        if links and training.config["trainer"].get("enable_checkpointing") is False:
            raise UsageError(
                f"--then: trainer.enable_checkpointing: false leaves no checkpoint for {links[0].command}; omit it."
            )
        made: list[Submission] = []
        for link in links:
            with _named(link.text):
                made.append(_link(training, link, env, launcher_flags))
        _check_exports(made)
        return cls(training, tuple(made), tuple(link.text for link in links))

    @property
    def with_own_keys(self) -> list[Submission]:
        """The links whose config differs from that of the training."""
        return [link for link in self.links if link.command != "export" and link.arguments != self.training.arguments]

    def check_with_slurm(self, env: Mapping[str, str], trial: Trial | None = None) -> None:
        """Raise UsageError if Slurm would not run one of the jobs; a ``trial`` has the resources of the training."""
        self.training.check_with_slurm(env, trial)
        for link, text in zip(self.links, self.texts, strict=True):
            with _named(text):
                link.check_with_slurm(env)

    def preview(self, env: Mapping[str, str]) -> str:
        """The batch scripts and the arguments of all jobs, with commands such as FIT in place of job ids."""
        parts, before = [self.training.preview(env)], "FIT"
        for link, text in zip(self.links, self.texts, strict=True):
            parts += [
                f"# --then {text!r}\n",
                replace(link, options=replace(link.options, after=self._after(before))).preview(env),
            ]
            before = link.command.upper()
        return "\n".join(parts)

    def submit(self, env: MutableMapping[str, str]) -> SubmittedJob:
        """Queue all jobs and register them as one; after a UsageError nothing is left behind.

        The training is held until the last link is queued, so that a chain starts as a whole or not at all.
        """
        if not self.links:
            return self.training.submit(env)
        held = replace(self.training, options=replace(self.training.options, is_held=True))
        queued = [held.queue(env)]
        source = queued[0].job.folder
        try:
            for link, text in zip(self.links, self.texts, strict=True):
                with _named(text):
                    options = replace(link.options, after=self._after(queued[-1].job.job), follows=source)
                    queued.append(replace(link, options=options).queue(env, queued[0].code))
                if link.command == "fit":
                    source = queued[-1].job.folder
            if "--hold" not in self.training.profile.sbatch:
                release_job(queued[0].job.job, env)
        except BaseException as error:
            raise _undone(queued, error, env) from None
        chain = replace(queued[0].job, then=tuple(part.job for part in queued[1:]))
        register(chain, env)
        return chain

    def _after(self, job: str) -> Dependency:
        return Dependency.on("aftercorr" if len(self.training.sweep_points) > 1 else "afterok", job)


def _undone(queued: Sequence[Queued], error: BaseException, env: Mapping[str, str]) -> BaseException:
    """Cancel all jobs, the last first, remove what was created for them, and return the error to raise."""
    for part in reversed(queued):
        part.cancel(env)
    for part in reversed(queued):
        part.remove()
    if not isinstance(error, UsageError):
        return error
    jobs = ", ".join(part.job.job for part in queued)
    return UsageError(f"{error.message} What was queued before ({jobs}) is cancelled and removed.")


def _check_exports(links: Sequence[Submission]) -> None:
    """Raise UsageError if two exports write the same file."""
    written: set[Path] = set()
    for link in links:
        if link.command == "fit":  # later exports write into the folder of this run
            written = {out for out in written if out.is_absolute()}
        elif link.command == "export":
            if (out := _export_options(link.arguments).out) in written:
                raise UsageError(f"--then: two exports write {out}; give one of them another file with --out.")
            written.add(out)


@contextmanager
def _named(text: str) -> Iterator[None]:
    """Prefix the message of a UsageError with its link."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--then {text!r}: {error.message}") from None


def _link(training: Submission, link: Link, env: Mapping[str, str], launcher_flags: Sequence[str]) -> Submission:
    """The submission of a link; its run folder is beside that of the training."""
    here = training.options.working_directory
    if (resume := training.options.resume) is not None and (launch := LaunchRecord.read(resume.launch)) is not None:
        here = Path(launch.folder or here)
    options = replace(
        training.options,
        working_directory=here,
        nodes=link.nodes,
        job_name=link.job_name or f"{training.job_name}-{link.command}",
        after=None,
        resume=None,
        follows=training.folder,
    )
    folder = training.folder.with_name(new_run_id())
    if link.command == "export":
        chosen = _export_options(link.keys)
        check_export_format(chosen.out)
        if link.nodes.max > 1:
            raise UsageError(f"--nodes: {link.nodes}: an export runs on one node; leave it out.")
        if chosen.out.is_absolute() and len(training.sweep_points) > 1:
            raise UsageError(
                f"--out: {chosen.out}: all runs of the sweep would write it; give a path relative to their folders."
            )
        if chosen.out.is_absolute() and not chosen.out.parent.is_dir():
            raise UsageError(f"--out: {chosen.out.parent} is not a folder here; make it first.")
        link.profile.check_python()
        arguments = (f"--out={chosen.out}", *([f"--part={chosen.part}"] if chosen.part else []))
        return replace(training, command="export", arguments=arguments, profile=link.profile, options=options, folder=folder)
    made = Submission.create([link.command, *training.arguments, *link.keys], link.profile, options, env, launcher_flags)
    for key in _OWN_KEYS:
        if (value := _value(made.config, key)) != _value(training.config, key):
            raise UsageError(f"{key}: {value!r}: {_OWN_KEYS[key]}; leave it out.")
    return replace(made, folder=folder, drawn_seed=training.drawn_seed)


def _value(config: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


class _Export(NamedTuple):
    out: Path
    part: str | None


def _export_options(arguments: Sequence[str]) -> _Export:
    """Parse the flags of an export; by default it writes ``weights.safetensors`` into the folder of the run."""
    parser = CommandLineParser(prog="export", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("weights.safetensors"))
    parser.add_argument("--part")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        flag = rest[0].partition("=")[0]
        raise UsageError(f"{flag!r} is not an argument of export{did_you_mean(flag, ['--out', '--part'])}")
    return _Export(options.out, options.part)
