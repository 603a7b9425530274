"""A submission of one run or sweep: check it, show it, or send it to Slurm."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import randbelow
from typing import Any, NamedTuple

from lockstep.config import (
    SweepPoint,
    check_characters,
    check_run_root,
    check_start,
    check_sweep_keys,
    sweep_points,
)
from lockstep.config.validation import validate_sweep
from lockstep.core import UsageError, python_path, shell_command, wandb_api_key
from lockstep.runs import (
    CodePaths,
    GitState,
    LaunchRecord,
    Run,
    SoftwareState,
    SweepRun,
    frozen_config,
    git_state,
    lockstep_state,
    new_run_id,
    snapshot,
    typed_command,
)
from lockstep.slurm import NodeTask, SubmittedJob, has_command, member_runs, register_job, state_folder
from lockstep.slurm.submission.batch_script import JobRequest, batch_script
from lockstep.slurm.submission.options import LaunchOptions
from lockstep.slurm.submission.profile import Profile
from lockstep.slurm.submission.sbatch import Trial, check_dependency, check_schedulable, submit_job

log = logging.getLogger(__name__)

_MIN_KEY_LENGTH = 20
"""Characters. W&B keys have 40 or more; a shorter one is a placeholder, which other texts may contain by chance."""

_PREVIEWED_RUNS = 10


class Queued(NamedTuple):
    """A queued job, its code, and what was created for it."""

    job: SubmittedJob
    code: CodePaths
    created: Sequence[Run] = ()
    new_folders: Sequence[Path] = ()

    def cancel(self, env: Mapping[str, str]) -> None:
        """Cancel the job, if it was queued."""
        scripts = self.job.folder.glob("slurm/*_submission.sh") if self.created else ()
        for job in {self.job.job, *(script.name.partition("_")[0] for script in scripts)} - {""}:
            subprocess.run(["scancel", job], env=dict(env), capture_output=True)

    def remove(self) -> None:
        """Remove what was created for the job, as far as possible."""
        for run in self.created:
            try:
                shutil.rmtree(run.folder)
            except OSError as error:
                log.warning("%s cannot be removed (%s); remove it yourself", run.folder, error.strerror)
        for folder in sorted(self.new_folders, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it is not empty, or is gone
                folder.rmdir()


@dataclass(frozen=True)
class Submission:
    """A run or sweep to submit, with everything checked that needs no torch.

    Attributes:
        arguments: Keys of the config, as typed.
        config: The values of all keys, as far as known without the classes.
        profile: Resources, with the launcher's flags applied.
        folder: Folder of the run or sweep; created by ``submit``.
        sweep_points: The values of each run of a sweep; one empty point without a sweep.
        secrets: Texts that must not be written anywhere.
        drawn_seed: Seed of the first run where the config asks for any seed.
    """

    command: str
    arguments: tuple[str, ...]
    config: Mapping[str, Any]
    profile: Profile
    options: LaunchOptions
    folder: Path
    sweep_points: tuple[SweepPoint, ...]
    secrets: tuple[str, ...]
    drawn_seed: int = field(default_factory=lambda: randbelow(2**32))

    @classmethod
    def create(
        cls,
        arguments: Sequence[str],
        profile: Profile,
        options: LaunchOptions,
        env: Mapping[str, str],
        launcher_flags: Sequence[str] = (),
    ) -> "Submission":
        """Check everything that needs neither torch nor Slurm; errors suggest ``launcher_flags`` for misspelt keys."""
        key = wandb_api_key(env)
        secrets = (key,) if key and len(key) >= _MIN_KEY_LENGTH else ()
        if any(secret in argument for secret in secrets for argument in options.command_line):
            raise UsageError(
                "The W&B key is in an argument, which all users can read; set WANDB_API_KEY instead, or use wandb login."
            )
        check_sweep_keys(options.sweep, launcher_flags)
        here = options.working_directory
        other_python = profile.container is not None or profile.python is not None
        other_python = other_python or bool(profile.modules or profile.setup or "PYTHONPATH" in profile.environment)
        configs = validate_sweep(arguments, options.sweep, launcher_flags, [here, *python_path(env)], other_python)
        config = configs[0]
        name, root = str(config["run"]["name"]), Path(config["run"]["root"]).absolute()
        Run.check_place(root, name)
        check_characters(root, here)
        check_run_root(root, name)
        keys = list(arguments)
        command = keys.pop(0) if keys and not keys[0].startswith("-") else "fit"
        profile.check_python()
        sizes = [number * profile.ranks for number in range(options.nodes.min, options.nodes.max + 1)]
        sees_data = options.reads_data and profile.container is None and profile.shared_filesystem
        has_checkpoint = options.follows is not None
        for each in configs:
            check_start(command, each, sizes, {**env, **profile.environment}, sees_data, has_checkpoint)
        options.check(config, profile)
        folder = options.resume.folder if options.resume else root / name / new_run_id()
        return cls(command, tuple(keys), config, profile, options, folder, sweep_points(options.sweep), secrets)

    def check_with_slurm(self, env: Mapping[str, str], trial: Trial | None = None) -> None:
        """Raise UsageError if Slurm would not run this job, or is not installed here; a ``trial`` has its resources."""
        if not has_command("sbatch", env):
            raise UsageError(
                "sbatch is not found: this is not a login node of a Slurm cluster; to start one on this machine: "
                + shell_command("cluster", "up")
            )
        if self.options.after is not None:
            check_dependency(self.options.after, len(self.sweep_points), env)
        check_schedulable(self._request(self.live_code(env)), env, trial)

    def live_code(self, env: Mapping[str, str]) -> CodePaths:
        """The code where it is now, without a snapshot."""
        return snapshot.live_code(self.options.working_directory, python_path(env))

    def run_arguments(self, index: int = 0) -> list[str]:
        """Return all arguments of a run: the given ones, those that its job needs, and the values of the sweep."""
        follows = self.options.follows and member_runs(self.options.follows, len(self.sweep_points))[index].folder
        if self.command == "export":
            return [str(follows), *self.arguments]
        added, deepspeed = [], self.config["deepspeed"]["config"]
        if follows:
            added.append(f"--ckpt_path={follows}")
        if deepspeed is not None and not self._has_argument("--deepspeed.config"):
            added.append(f"--deepspeed.config={deepspeed}")  # as an argument it is copied like other config files
        if self._is_sweep and not self.config["wandb"]["group"]:
            added.append(f"--wandb.group={self.folder.name}")
        if not self.profile.shared_filesystem and not self._has_argument("--shared_filesystem"):
            added.append("--shared_filesystem=false")
        if self.config["seed_everything"] is True:  # drawn once: a restart must have the same seed
            added.append(f"--seed_everything={(self.drawn_seed + index) % 2**32}")
        return [*self.arguments, *added, *(f"--{key}={value}" for key, value in self.sweep_points[index].items())]

    def preview(self, env: Mapping[str, str]) -> str:
        """Return the batch script and the arguments of each run, as ``submit`` would send them."""
        script = batch_script(self._request(self.live_code(env)))
        lines = [
            f"# {run.folder}: {shlex.join([self.command, *self.run_arguments(index)])}"
            for index, run in enumerate(self._runs[:_PREVIEWED_RUNS])
        ]
        if (more := len(self._runs) - _PREVIEWED_RUNS) > 0:
            lines.append(f"# … and {more} more runs")
        return "\n".join([script, *(line.replace("\n", "\n# ") for line in lines), ""])

    def submit(self, env: MutableMapping[str, str]) -> SubmittedJob:
        """Create the run folders, queue the job and register it; after a UsageError nothing is left behind."""
        job = self.queue(env).job
        register(job, env)
        return job

    def queue(self, env: MutableMapping[str, str], code: CodePaths | None = None) -> Queued:
        """Create the run folders and queue the job; ``code`` is that of the run that it follows, if any."""
        if self.options.resume is not None:
            return self._queue_resume(self.options.resume, env)
        new_folders = [folder for folder in (self.folder.parent, *self.folder.parents) if not folder.exists()]
        # If two submissions have drawn the same id, one of them draws another.
        first = Run.create(self.folder.parent.parent, self.folder.parent.name)
        return replace(self, folder=first.folder)._queue_new(first, new_folders, code, env)

    def _queue_new(
        self, first: Run, new_folders: Sequence[Path], code: CodePaths | None, env: MutableMapping[str, str]
    ) -> Queued:
        """Create the other folders of a sweep, and queue the job."""
        created = [first]
        try:
            for run in self._runs:
                if run != first:
                    created.append(Run.create(run.folder.parent.parent, run.name, run.id))
            with ThreadPoolExecutor() as threads:  # git runs while the code is copied
                checkout = threads.submit(git_state, self.options.working_directory)
                software = threads.submit(lockstep_state)
                code = self._code(env) if code is None else self._share_code(code, env)
            job = submit_job(self._request(code), self._tasks(code, checkout, software), env)
        except BaseException as error:
            queued = Queued(self._submitted("", env), self.live_code(env), created, new_folders)
            queued.cancel(env)
            queued.remove()
            if isinstance(error, OSError):
                raise UsageError(f"The run folder {self.folder} cannot be written ({error}); nothing was queued.") from None
            raise
        return Queued(self._submitted(job, env), code, created, new_folders)

    def _queue_resume(self, run: Run, env: MutableMapping[str, str]) -> Queued:
        """Queue a job that resumes ``run`` with the code and in the folder that it was submitted with."""
        launch = LaunchRecord.read(run.launch)
        if launch is None or launch.paths is None or launch.folder is None:
            command = shell_command("local", "--resume", run.folder)
            raise UsageError(f"--resume: {run.launch} does not say how the run was submitted; resume it here with: {command}")
        code = CodePaths(tuple(map(Path, launch.paths)), None, launch.code or "")
        task = self._task(run, self.arguments, code)
        options = replace(self.options, working_directory=Path(launch.folder))
        return Queued(self._submitted(submit_job(self._request(code)._replace(options=options), [task], env), env), code)

    def _submitted(self, job: str, env: Mapping[str, str]) -> SubmittedJob:
        conf = env.get("SLURM_CONF", "")
        return SubmittedJob(job, self.folder, self.job_name, len(self.sweep_points), conf, command=self.command)

    def _has_argument(self, flag: str) -> bool:
        return any(argument.startswith(flag) for argument in self.arguments)

    @property
    def _runs(self) -> list[Run]:
        return member_runs(self.folder, len(self.sweep_points))

    @property
    def _is_sweep(self) -> bool:
        return len(self.sweep_points) > 1

    @property
    def job_name(self) -> str:
        """Name of the job."""
        return self.options.job_name or str(self.config["run"]["name"])

    def _code(self, env: Mapping[str, str]) -> CodePaths:
        """Copy the code into the run folder, unless the options say otherwise."""
        if not self.options.snapshot:
            return self.live_code(env)
        here = self.options.working_directory
        code = snapshot.take_snapshot(here, self.folder, python_path(env), self.secrets, state_folder(env) / "snapshots")
        frozen_config.check_not_ignored(self.config, code, here, env)
        return code

    def _share_code(self, code: CodePaths, env: Mapping[str, str]) -> CodePaths:
        """Link the snapshot of the run that this one follows into the run folder."""
        if code.digest and (source := self.options.follows) is not None:
            for name in ("code", "code.sha256"):
                (self.folder / name).symlink_to(os.path.relpath(source / name, self.folder))
        if code.project is not None:
            frozen_config.check_not_ignored(self.config, code, self.options.working_directory, env)
        return code

    def _tasks(self, code: CodePaths, checkout: Future[GitState | None], software: Future[SoftwareState]) -> list[NodeTask]:
        """Write the launch record of each run, freeze its config files, and return its task."""
        freezer = frozen_config.ConfigFreezer(code, self.folder / "configs", self.secrets)
        record = LaunchRecord(
            typed_command(self.options.command_line, sys.orig_argv),
            str(self.options.nodes),
            self.profile.ranks,
            checkout.result(),
            software.result(),
            sys.executable,
            folder=str(self.options.working_directory),
            profile=self.options.profile,
            slurm=self.profile.non_default_values(),
            code=code.digest,
            paths=[str(path) for path in code.paths],
            after=str(self.options.after) if self.options.after is not None else None,
        )
        tasks = []
        for index, run in enumerate(self._runs):
            if self._is_sweep:
                values = self.sweep_points[index]
                record = replace(record, sweep=SweepRun(self.folder.name, index, values))
                for name in ("code", "code.sha256") if self.options.snapshot else ():
                    (run.folder / name).symlink_to(Path("..") / self.folder.name / name)
            record.write(run.launch)
            arguments = freezer.freeze(self.run_arguments(index))
            tasks.append(self._task(run, arguments, code))
        return tasks

    def _task(self, run: Run, arguments: tuple[str, ...], code: CodePaths) -> NodeTask:
        profile, slurm = self.profile, self.folder / "slurm"
        return NodeTask(run.folder, slurm, self.command, arguments, code.digest, profile.ranks, profile.cpus)

    def _request(self, code: CodePaths) -> JobRequest:
        return JobRequest(self.job_name, self.folder, code, self.profile, self.options, len(self.sweep_points))


def begin_trial(profile: Profile, options: LaunchOptions, env: Mapping[str, str]) -> AbstractContextManager[Trial | None]:
    """Ask Slurm whether it would run a job with these resources; None if it is not installed here."""
    if not has_command("sbatch", env):
        return nullcontext()
    here = options.working_directory
    name, runs = options.job_name or "lockstep", len(sweep_points(options.sweep))
    return Trial(JobRequest(name, here, snapshot.live_code(here, python_path(env)), profile, options, runs), env)


def register(job: SubmittedJob, env: Mapping[str, str]) -> None:
    """Register a queued job; a full disk must not prevent a submission."""
    try:
        register_job(job, env)
    except OSError as error:
        log.warning("job %s is queued, but %s will not list it: %s.", job.job, shell_command("jobs"), error)
