"""Submit a run, or a sweep, to Slurm through submitit: one task per node. Prints the job id.

    {program} --nodes 4                                          # the shipped config digits on four nodes
    {program} --nodes 4 --profile a100 --time 24:00:00 --config imagenet
    {program} --nodes 4 --dry-run                                # everything but sbatch
    {program} --nodes 4 --profile a100 --plan                    # which strategies fit into GPU memory
    {program} --sweep model.lr=0.1,0.03 --sweep seed_everything=1,2      # four runs, one job array
    {program} --nodes 4 --then test --then "export --part network"       # three jobs, each after the one before

All other arguments go to the trainer: an optional command (fit, validate, test, predict), then keys of the config. Flags
override the profile (--profile, or the variable LOCKSTEP_PROFILE).
"""

import argparse
import gc
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

from lockstep.cli import local
from lockstep.cli.help import LaunchParser
from lockstep.cli.hints import check_misplaced
from lockstep.config import COMMANDS, find_shipped, parse_sweep, with_config
from lockstep.config.validation import shows_only
from lockstep.core import CommandLineParser, LockstepError, UsageError, did_you_mean, int_at_least
from lockstep.runs import LaunchRecord, Run
from lockstep.slurm import Dependency, check_slurm_conf, follow
from lockstep.slurm.submission import (
    LINK_COMMANDS,
    PROFILE_FLAGS,
    Chain,
    LaunchOptions,
    Link,
    NodeRange,
    Profile,
    Submission,
    apply_flags,
    begin_trial,
    check_heterogeneous,
    describe_resources,
    load_profile,
    plan_memory,
    profile_folders,
    resolve_config,
    scrub_environment,
    submitted_nodes,
    submitted_profile,
)


def make_parser(program: str, plan_help: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of the launcher's own flags; ``plan_help`` is the help of ``lockstep plan``, without flags of jobs."""
    parser = LaunchParser(program, plan_help or __doc__, lists_profiles=True)
    add_resources(parser.add_argument_group("resources"))
    job = parser.add_argument_group("job")
    job.add_argument("--job-name", metavar="NAME", help="name of the job (default: run.name)")
    job.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start after these jobs or runs have finished successfully, or as Slurm writes it: afterany:12:13, singleton …",
    )
    job.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="COMMAND",
        help="command to run after the training, as a job on one node: test, validate, predict, fit or export, with its own "
        "keys and resources in quotes (test --nodes 2); repeatable",
    )
    job.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,…", help="one run per value; repeatable")
    job.add_argument(
        "--array-parallelism", type=int_at_least(1), default=256, metavar="N", help="runs of a sweep at a time (default 256)"
    )
    job.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this folder with its own code and config")
    job.add_argument("--no-snapshot", action="store_true", help="run the code as it is when the job starts, not a copy")
    job.add_argument("--follow", action="store_true", help="print rank zero's log until the end; exit with the run's status")
    checks = parser.add_argument_group("show only, and submit nothing")
    checks.add_argument("--check", action="store_true", help="check the config with torch, and the resources with Slurm")
    checks.add_argument("--dry-run", action="store_true", help="like --check, and print the batch script and complete config")
    checks.add_argument("--plan", action="store_true", help="print the memory that the model needs and which strategies fit")
    for action in [*job._group_actions, *checks._group_actions] if plan_help else []:
        action.help = argparse.SUPPRESS
    return parser


def add_resources(group: "argparse._ArgumentGroup | argparse.ArgumentParser") -> None:
    """Add the flags of resources, which a link of a chain has too."""
    group.add_argument(
        "--nodes",
        type=NodeRange.parse,
        metavar="N[-M]",
        help="nodes, or a range of them (default 1; with --resume all resources are as in the submission of the run)",
    )
    group.add_argument("--profile", metavar="NAME", help="name of a profile, or path of a file")
    helps = {f.name: f.metadata["help"] for f in fields(Profile)}
    for name, kind in PROFILE_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=helps[name])
    group.add_argument("--exclusive", action="store_true", default=None, help=helps["exclusive"])
    for name in ("sbatch", "srun"):
        group.add_argument(f"--{name}", action="append", metavar="=ARGUMENT", help=helps[name])


def parse_link(text: str, base: Profile) -> Link:
    """Parse a value of ``--then``; by default it runs on one node, any one, with the other resources of ``base``, not held.

    Raises:
        UsageError: It is not a command with keys and flags of resources.
    """
    parser = CommandLineParser(prog="--then", add_help=False, allow_abbrev=False)
    add_resources(parser)
    parser.add_argument("--job-name")
    try:
        words = shlex.split(text)
        if not words or words[0] not in LINK_COMMANDS:
            name = words[0] if words else ""
            raise UsageError(f"{name!r} is not a command{did_you_mean(name, LINK_COMMANDS)}")
        flags, keys = parser.parse_known_args(words[1:])
        check_heterogeneous(words)
        whole = vars(make_parser("--then").parse_args([]))
        for name in (key.partition("=")[0] for key in keys):
            if name.startswith("--") and name[2:].replace("-", "_") in whole:
                raise UsageError(f"{name}: is not for one link; give it to the whole chain, before --then.")
        if shown := next(filter(shows_only, keys), None):
            raise UsageError(f"{shown} shows help or a config and runs nothing; leave it out.")
        # A list of nodes requests all of them, which are too many for one node.
        base = replace(base, nodelist=None, sbatch=tuple(argument for argument in base.sbatch if argument != "--hold"))
        if flags.profile:
            base = load_profile(flags.profile, os.environ, profile_folders(os.environ, Path.cwd()))
        return Link(
            text, words[0], tuple(find_shipped(keys)), flagged(base, flags), flags.nodes or NodeRange(1, 1), flags.job_name
        )
    except UsageError as error:
        raise UsageError(f"--then {text!r}: {error.message}") from None
    except ValueError as error:
        raise UsageError(f"--then {text!r}: {error}; quote the link as the shell does.") from None


def flagged(base: Profile, flags: argparse.Namespace) -> Profile:
    """Return ``base`` with the given flags."""
    return apply_flags(base, {name: getattr(flags, name) for name in (*PROFILE_FLAGS, "exclusive", "sbatch", "srun")})


def named_profile(flags: argparse.Namespace) -> str | None:
    """The name of the profile, or the absolute path of its file; None without one."""
    name = flags.profile or os.environ.get("LOCKSTEP_PROFILE") or None
    is_file = name is not None and ("/" in name or name.endswith(".yaml"))
    return str(Path(name).expanduser().absolute()) if name is not None and is_file else name


def resources(flags: argparse.Namespace, resume: Run | None) -> tuple[Profile, NodeRange]:
    """Take profile and nodes from the flags, and the rest from the submission of the run to ``resume``, which it then prints.

    Raises:
        UsageError: A profile, a value or the record of the run is wrong.
    """
    launch = LaunchRecord.read(resume.launch) if resume is not None else None
    if resume is None or launch is None or launch.slurm is None:
        profile = load_profile(flags.profile, os.environ, profile_folders(os.environ, Path.cwd()))
        return flagged(profile, flags), flags.nodes or NodeRange(1, 1)
    nodes = flags.nodes or submitted_nodes(resume, launch)
    if flags.profile:
        profile = load_profile(flags.profile, os.environ, profile_folders(os.environ, Path.cwd()))
    else:
        folders = profile_folders(os.environ, Path(launch.folder or Path.cwd()))
        profile = submitted_profile(resume, launch, vars(flags), folders)
    profile = flagged(profile, flags)
    print(f"resources, from the flags and the submission of the run: {describe_resources(nodes, profile)}", file=sys.stderr)
    return profile, nodes


def spread_jobs(arguments: Sequence[str]) -> list[str]:
    """Replace ``--after 12 13`` by ``--after=12 --after=13``: argparse would also read a command of the trainer as a job."""
    spread: list[str] = []
    takes_jobs = False
    for argument in arguments:
        if takes_jobs and not argument.startswith("-") and argument not in COMMANDS:
            if spread[-1] == "--after":
                spread.pop()
            spread.append(f"--after={argument}")
        else:
            takes_jobs = argument.partition("=")[0] == "--after"
            spread.append(argument)
    return spread


def main(arguments: Sequence[str], program: str = "lockstep submit", plan_help: str | None = None) -> int:
    """Submit the run; return 0, the exit status of an error (2: usage), or with --follow that of the run (see ``jobs``)."""
    try:
        return _submit(arguments, program, plan_help)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    finally:
        gc.freeze()  # a last garbage collection would take a tenth of the process's time


def _plan(submission: Submission, flags: argparse.Namespace) -> int:
    """Print which strategies fit into the memory."""
    table, unknown = plan_memory(submission, os.environ)
    if flags.sweep or flags.then:
        print(f"--plan covers only the {'first run of the sweep' if flags.sweep else 'training'}.")
    print(unknown, file=sys.stderr, end="")
    print(table, end="")
    return 0


def _submit(arguments: Sequence[str], program: str, plan_help: str | None) -> int:
    parser = make_parser(program, plan_help)
    check_heterogeneous(arguments)
    flags, trainer_arguments = parser.parse_known_args(spread_jobs(arguments))
    check_slurm_conf(os.environ)
    resume = Run.open(flags.resume) if flags.resume else None
    sweep = parse_sweep(flags.sweep)
    saved = str(resume.config) if resume is not None else None
    trainer_arguments = with_config(trainer_arguments, saved, checkpoints=sweep.get("ckpt_path", ()))
    if any(shows_only(argument) for argument in trainer_arguments):
        return subprocess.run([sys.executable, "-m", "lockstep.cli", "train", *trainer_arguments]).returncode
    if ignored := [name for name in scrub_environment(os.environ) if name.startswith("SBATCH_")]:
        print(f"ignored: {', '.join(ignored)}; put them into a profile.", file=sys.stderr)
    profile, nodes = resources(flags, resume)
    options = LaunchOptions(
        working_directory=Path.cwd(),
        command_line=[*program.split(), *arguments],
        nodes=nodes,
        job_name=flags.job_name,
        after=Dependency.parse(flags.after, os.environ) if flags.after else None,
        sweep=sweep,
        array_parallelism=flags.array_parallelism,
        snapshot=not flags.no_snapshot,
        reads_data=not flags.plan,
        resume=resume,
        profile=named_profile(flags),
    )
    names = [name.replace("_", "-") for name in (*vars(flags), "help")]
    has_slurm = shutil.which("sbatch") is not None
    # Slurm checks the resources while this process checks the config. If both are wrong, the config is named.
    with nullcontext() if flags.plan else begin_trial(profile, options, os.environ) as trial:
        try:
            submission = Submission.create(trainer_arguments, profile, options, os.environ, names)
        except UsageError:
            check_misplaced(trainer_arguments, names, local.make_parser)
            raise
        chain = Chain.create(submission, [parse_link(text, profile) for text in flags.then], os.environ, names)
        if flags.plan:
            return _plan(submission, flags)
        if has_slurm or not flags.dry_run:
            chain.check_with_slurm(os.environ, trial)
    if flags.dry_run or flags.check:
        config = resolve_config(submission, os.environ)
        for own in chain.with_own_keys:
            config += f"\n# {own.command}\n{resolve_config(own, os.environ)}"
        if flags.dry_run:
            print(chain.preview(os.environ), config, sep="\n", end="")
        if not has_slurm:
            print("Slurm is not installed here, so it did not check the resources.", file=sys.stderr)
        return 0
    job = chain.submit(os.environ)
    print(*(link.job for link in job.links), sep="\n", flush=True)
    for link in job.links:
        print(f"{f'{link.command}: ' if job.then else ''}run folder {link.folder}", file=sys.stderr)
    return follow(job, os.environ) if flags.follow else 0
