"""One call of the launcher: checked, shown, or sent. No torch here."""

import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lockstep
from lockstep.config import SweepPoint, check_checkpoint_path, check_deepspeed, check_run_root, check_sweep_keys, sweep_points
from lockstep.config.validation import validate_arguments
from lockstep.core import UsageError, python_path, wandb_api_key
from lockstep.runs import (
    CodePaths,
    LaunchRecord,
    Run,
    RunResult,
    check_not_ignored,
    config_files_of,
    freeze_config_files,
    git_state,
    live_code,
    new_run_id,
    take_snapshot,
)
from lockstep.slurm import SubmittedJob, TrainTask, register_job
from lockstep.slurm.submission.batch_script import JobRequest, batch_script
from lockstep.slurm.submission.profile import Profile
from lockstep.slurm.submission.resources import NodeRange, check_resources
from lockstep.slurm.submission.sbatch import check_dependency, check_schedulable, submit_job

log = logging.getLogger(__name__)


_PACKAGE = Path(lockstep.__file__).resolve().parent


_MIN_KEY_LENGTH = 20
"""Characters. W&B's have 40 and more; a shorter one is a stand-in, and may be part of innocent words."""


def _is_finished(run: Run) -> bool:
    result = RunResult.read(run.result)
    return result is not None and result.is_finished


@dataclass(frozen=True)
class Submission:
    """What is to be sent, and everything that was found out about it without torch.

    Attributes:
        command: fit, validate, test or predict.
        arguments: Keys of the config, as they were typed.
        config: What they say, as ``check`` gave it.
        profile: Resources, flags included.
        nodes: Number of nodes, or a range.
        here: Folder of submission.
        folder: Run folder, or folder of the sweep; not made yet.
        job_name: Name of the job.
        after: Job that must have ended well before.
        points: The runs of a sweep; a single empty one without a sweep.
        array_parallelism: How many of them run at the same time.
        snapshot: Whether to copy the code.
        typed: The whole command line.
        secrets: What must not be written anywhere.
        resume: A run to go on with, in its own folder and on its own code; None makes a new one.
    """

    command: str
    arguments: tuple[str, ...]
    config: Mapping[str, Any]
    profile: Profile
    nodes: NodeRange
    here: Path
    folder: Path
    job_name: str
    after: str | None
    points: tuple[SweepPoint, ...]
    array_parallelism: int
    snapshot: bool
    typed: tuple[str, ...]
    secrets: tuple[str, ...]
    resume: Run | None = None

    @classmethod
    def create(
        cls,
        arguments: Sequence[str],
        profile: Profile,
        nodes: NodeRange,
        here: Path,
        *,
        typed: Sequence[str],
        flags: Sequence[str] = (),
        job_name: str | None = None,
        after: str | None = None,
        sweep: Mapping[str, Sequence[str]] | None = None,
        array_parallelism: int = 256,
        snapshot: bool = True,
        resume: Run | None = None,
        env: Mapping[str, str],
    ) -> "Submission":
        """A submission whose mistakes, as far as they show without torch, are found.

        Raises:
            UsageError: The first of them.
        """
        if resume and (sweep or _is_finished(resume)):
            raise UsageError(f"--resume: {resume.folder} is {'one run, no sweep' if sweep else 'finished'}.")
        if array_parallelism < 1:
            raise UsageError(f"--array-parallelism: {array_parallelism} must be 1 or more.")
        if after is not None and not re.fullmatch(r"\d+(_\d+)?", after):
            raise UsageError(f"--after: {after!r} is no job; write the number that sbatch or this launcher gave.")
        key = wandb_api_key(env)
        secrets = (key,) if key and len(key) >= _MIN_KEY_LENGTH else ()
        if any(secret in argument for secret in secrets for argument in typed):
            raise UsageError(
                "The W&B key stands in an argument, which everybody can read; leave it in WANDB_API_KEY, or use wandb login."
            )
        check_sweep_keys(sweep or {}, flags)
        elsewhere = profile.container is not None or profile.python is not None
        config = validate_arguments(arguments, flags, [here, *python_path(env)], sweep, elsewhere)
        name, root = str(config["run"]["name"]), Path(config["run"]["root"]).absolute()
        Run.check_name(name)
        check_run_root(root, name, here)
        has_command = bool(arguments) and not arguments[0].startswith("-")
        check_checkpoint_path(arguments[0] if has_command else "fit", config["ckpt_path"], sweep or {})
        check_deepspeed(config)
        check_resources(config, profile, nodes)
        return cls(
            command=arguments[0] if has_command else "fit",
            arguments=tuple(arguments[1:] if has_command else arguments),
            config=config,
            profile=profile,
            nodes=nodes,
            here=here,
            folder=resume.folder if resume else root / name / new_run_id(),
            job_name=job_name or name,
            after=after,
            points=sweep_points(sweep or {}),
            array_parallelism=array_parallelism,
            snapshot=snapshot,
            typed=tuple(typed),
            secrets=secrets,
            resume=resume,
        )

    def check_with_slurm(self, env: Mapping[str, str]) -> None:
        """Have Slurm say whether it would ever run this.

        Raises:
            UsageError: It would not, or it is not here.
        """
        if shutil.which("sbatch", path=env.get("PATH")) is None:
            raise UsageError(
                "sbatch is not found: this is no login node of a Slurm cluster; see slurm/cluster.py for one here."
            )
        if self.after is not None:
            check_dependency(self.after, env)
        check_schedulable(self._request(self.live_code(env)), env)

    def live_code(self, env: Mapping[str, str]) -> CodePaths:
        """The code as it is now."""
        return live_code(self.here, _PACKAGE, env.get("PYTHONPATH", ""))

    def first_run_arguments(self) -> list[str]:
        """All arguments of the first run."""
        return self._run_arguments(self.arguments, self.points[0], {})

    def preview(self, env: Mapping[str, str]) -> str:
        """The batch script, and what each run is told, as ``submit`` would send them."""
        script = batch_script(self._request(self.live_code(env)))
        shown = [
            f"# {run.folder}: {shlex.join([self.command, *self._run_arguments(self.arguments, point, {})])}".replace(
                "\n", "\n# "
            )
            for run, point in self._runs()
        ]
        more = [f"# … and {len(shown) - 10} more runs"] if len(shown) > 10 else []
        return "\n".join([script, *shown[:10], *more, ""])

    def submit(self, env: MutableMapping[str, str]) -> SubmittedJob:
        """Make the run folders, queue the job, and return it.

        Raises:
            UsageError: A folder or file cannot be written, or Slurm does not take the job; nothing is left behind.
        """
        if self.resume is not None:
            return self._submit_resume(self.resume, env)
        new = [folder for folder in (self.folder.parent, *self.folder.parents) if not folder.exists()]
        made: list[Run] = []
        try:
            for run in dict.fromkeys([Run(self.folder), *(run for run, _ in self._runs())]):
                made.append(Run.create(run.folder.parent.parent, run.name, run.id))
            code = self._code(env)
            if self.snapshot:
                check_not_ignored(self.config, code, self.here, env)
            arguments = freeze_config_files(self.arguments, code, self.folder, self.secrets)
            own = self.config["deepspeed"]["config"]
            if own is not None and not any(argument.startswith("--deepspeed.config") for argument in arguments):
                arguments = (*arguments, *freeze_config_files([f"--deepspeed.config={own}"], code, self.folder, self.secrets))
            git = git_state(self.here)
            swept = {text for point in self.points for text in config_files_of(point)}
            files = {text: freeze_config_files([text], code, self.folder, self.secrets)[0] for text in swept}
            jobs = [
                self._job(run, point, [*self._run_arguments(arguments, point, files)], code, git, index)
                for index, (run, point) in enumerate(self._runs())
            ]
            job = submit_job(self._request(code), jobs, env)
        except BaseException as error:
            for script in self.folder.glob("slurm/*_submission.sh"):  # queued, and then something went wrong
                subprocess.run(["scancel", script.name.partition("_")[0]], env=dict(env), capture_output=True)
            for run in made:
                shutil.rmtree(run.folder)
            for folder in sorted(new, key=lambda path: len(path.parts), reverse=True):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise UsageError(f"The run folder {self.folder} cannot be written ({error}); nothing was queued.") from None
            raise
        return self._recorded(job, env)

    def _submit_resume(self, run: Run, env: MutableMapping[str, str]) -> SubmittedJob:
        """Queue a job that goes on with ``run``."""
        launch = LaunchRecord.read(run.launch)
        if launch is None or launch.paths is None or launch.folder is None:
            raise UsageError(f"--resume: {run.launch} does not say how the run was submitted; resume it with launch/local.py.")
        code = CodePaths(tuple(map(Path, launch.paths)), None, launch.code or "")
        train = TrainTask(run.folder, self.command, self.arguments, code.digest, self.profile.cpus)
        return self._recorded(submit_job(replace(self._request(code), here=Path(launch.folder)), [train], env), env)

    def _recorded(self, job: str, env: Mapping[str, str]) -> SubmittedJob:
        queued = SubmittedJob(job, self.folder, self.job_name, len(self.points), env.get("SLURM_CONF", ""))
        try:
            register_job(queued, env)
        except OSError as error:
            log.warning("job %s is queued, but jobs.py will not know it: %s.", job, error)
        return queued

    def _runs(self) -> list[tuple[Run, SweepPoint]]:
        """Each run and its values; the runs of a sweep lie beside the folder of the sweep."""
        if not self._is_sweep:
            return [(Run(self.folder), self.points[0])]
        digits = max(3, len(str(len(self.points) - 1)))
        return [
            (Run(self.folder.with_name(f"{self.folder.name}-{index:0{digits}}")), point)
            for index, point in enumerate(self.points)
        ]

    @property
    def _is_sweep(self) -> bool:
        return len(self.points) > 1

    def _code(self, env: Mapping[str, str]) -> CodePaths:
        if not self.snapshot:
            return self.live_code(env)
        return take_snapshot(self.here, _PACKAGE, self.folder, env.get("PYTHONPATH", ""), self.secrets)

    def _run_arguments(self, arguments: Sequence[str], point: SweepPoint, files: Mapping[str, str]) -> list[str]:
        """All arguments of one run; ``files`` are what stands for those that name a file."""
        told = list(arguments)
        if self._is_sweep and not self.config["wandb"]["group"]:
            told.append(f"--wandb.group={self.folder.name}")
        if not self.profile.shared_filesystem and not any(word.startswith("--shared_filesystem") for word in arguments):
            told.append("--shared_filesystem=false")
        return [*told, *(files.get(text, text) for text in (f"--{key}={value}" for key, value in point.items()))]

    def _job(
        self, run: Run, point: SweepPoint, told: Sequence[str], code: CodePaths, git: Mapping[str, Any] | None, index: int
    ) -> TrainTask:
        """Describe the run in its folder and make what its ranks get."""
        if self._is_sweep and self.snapshot:
            for name in ("code", "code.sha256"):
                (run.folder / name).symlink_to(Path("..") / self.folder.name / name)
        default = Profile()
        resources = {
            f.name: getattr(self.profile, f.name)
            for f in fields(Profile)
            if getattr(self.profile, f.name) != getattr(default, f.name)
        }
        launch = LaunchRecord(
            shlex.join(self.typed),
            str(self.nodes),
            self.profile.ranks,
            git,
            folder=str(self.here),
            slurm={key: str(value) for key, value in resources.items()},
            code=code.digest,
            paths=[str(path) for path in code.paths],
            sweep={"id": self.folder.name, "index": index, "values": point} if self._is_sweep else None,
        )
        launch.write(run.launch)
        return TrainTask(run.folder, self.command, tuple(told), code.digest, self.profile.cpus)

    def _request(self, code: CodePaths) -> JobRequest:
        return JobRequest(
            self.job_name,
            self.folder,
            self.here,
            code,
            self.nodes,
            self.profile,
            self.after,
            len(self.points),
            self.array_parallelism,
        )
