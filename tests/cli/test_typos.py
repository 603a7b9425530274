"""Fifty mistakes on the command line: each names key, value and remedy, at each door, and leaves nothing behind.

First in this process, where neither torch nor Slurm may be reached; then some as a person types them, without torch.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import REPO
from support.waiting import wait_until

from lockstep import cli
from lockstep.cli import jobs, local, submit
from lockstep.config import with_config
from lockstep.slurm.submission import Submission

LOCAL_ONLY, SUBMIT_ONLY = "is a flag of lockstep local; ", "is a flag of lockstep submit; leave it out here"

TYPOS: list[tuple[str, str, str | None]] = [  # arguments; what local says, and submit; None: the same; an empty text: valid
    # flags of the launchers
    ("--folow", "folow: unknown key", "folow: unknown key; did you mean 'follow'?"),
    ("--dryrun", "dryrun: unknown key", "dryrun: unknown key; did you mean 'dry-run'"),
    ("--ranks 2", "", f"--ranks: {LOCAL_ONLY}use --ranks-per-node here"),
    ("--ranks-per-node 2", "--ranks-per-node: is a flag of lockstep submit; use --ranks here", ""),
    ("--ranks 100000", "--ranks: 100000 would be 100000 processes on the ", f"--ranks: {LOCAL_ONLY}use --ranks-per-node here"),
    ("--nodes 5000 --ranks 20", "--ranks: 20 on each of 5000 nodes would be 100000 processes on ", f"--ranks: {LOCAL_ONLY}"),
    ("--nodes two", "--nodes: invalid int value: 'two'", "--nodes: 'two' is not a number of nodes; write 4, or 2-4"),
    ("--nodes 0", "--nodes: 0 must be 1 or more", None),
    (
        "--time 24:00",
        f"--time: {SUBMIT_ONLY}",
        "time: '24:00' is ambiguous: Slurm reads minutes and seconds; write 24:00:00",
    ),
    ("--time 1-99:00", f"--time: {SUBMIT_ONLY}", "time: '1-99:00' is not a time; minutes and seconds go to 59, and hours"),
    ("--time 00:99:99", f"--time: {SUBMIT_ONLY}", "time: '00:99:99' is not a time"),
    ("--mem 4X", f"--mem: {SUBMIT_ONLY}", "mem: '4X' is not a size; write a number with the suffix K, M, G or T"),
    ("--profile a10", f"--profile: {SUBMIT_ONLY}", "did you mean 'a100'?"),
    ("--python /nope/python", f"--python: {SUBMIT_ONLY}", "python: /nope/python is not a program here; give the path"),
    ("--after tomorrow", f"--after: {SUBMIT_ONLY}", "--after: 'tomorrow' is neither a job id nor a run that lockstep has"),
    ("--after afterokay:12", f"--after: {SUBMIT_ONLY}", "'afterokay' in 'afterokay:12' is not a kind of dependency; did you"),
    ("--after 12 13:", "--after: is a flag of lockstep submit; ", "--after: '13:' does not say when: write afterok:13:"),
    ("--after 12 tset", "", "--after: 'tset' is neither a job id nor a run"),
    ("--after", "", "--after: expected one argument"),
    ("--nodes 1 : --nodes 2", "':' is not a command", "':': heterogeneous jobs are not supported: all nodes of a run have"),
    ("--srun=--het-group=0,1", "", "srun: '--het-group=0,1': heterogeneous jobs are not supported"),
    ("--resume /nope", "/nope is not a run folder: it has no config.yaml", "/nope is not a run folder: it has no config.yaml"),
    ("--then tset", f"--then: {SUBMIT_ONLY}", "--then 'tset': 'tset' is not a command; did you mean 'test'?"),
    ("--then 'test --data.btch_size 4'", "", "--then 'test --data.btch_size 4': data.btch_size (value 4): unknown argument of"),
    ("--then 'test --config gone'", "", "--then 'test --config gone': config: gone does not exist"),
    ("--then 'test --ckpt_path /x'", "", "ckpt_path: '/x': a link uses the newest checkpoint of the run before; leave it out."),
    ("--then 'test --run.name other'", "", "run.name: 'other': a link takes that of the training; leave it out."),
    ("--then 'test --sweep model.lr=1,2'", "", "--sweep: is not for one link; give it to the whole chain, before --then."),
    ("--then 'test --help'", "", "--then 'test --help': --help shows help or a config and runs nothing; leave it out."),
    ("--then 'test --time 24:00'", "", "--then 'test --time 24:00': time: '24:00' is ambiguous"),
    ('--then "test \'x"', "", "No closing quotation; quote the link as the shell does."),
    ("--then 'export --prt x'", "", "'--prt' is not an argument of export; did you mean '--part'"),
    ("--then 'export --out w.pt'", "", "--out: w.pt: an export is in the safetensors format; name it w.safetensors."),
    ("--then 'export --nodes 2'", "", "--nodes: 2: an export runs on one node; leave it out."),
    ("--then 'export --out /nope/x'", "", "--out: /nope is not a folder here; make it first."),
    ("--then export --then export", "", "--then: two exports write weights.safetensors; give one of them another file"),
    ("--sweep model.lr=1,2 --then 'export --out /tmp/x'", "", "--out: /tmp/x: all runs of the sweep would write it"),
    ("--trainer.enable_checkpointing false --then test", "", "trainer.enable_checkpointing: false leaves no checkpoint for"),
    (
        "predict --config digits --ckpt_path mine.yaml --then test",
        "",
        "--then: predict leaves no checkpoint for test; begin with a training",
    ),
    ("--sweep lr=0.1,0.2", f"--sweep: {SUBMIT_ONLY}", "lr (value 0.1): unknown key; did you mean 'model.lr'?"),
    ("--sweep model.lr", f"--sweep: {SUBMIT_ONLY}", "--sweep: 'model.lr' must have the form KEY=A,B,…"),
    ("-n 4", "'-n' is not a key: keys begin with --", None),
    # configs and commands
    (
        "--config configs/cluster/a100.yaml",
        "configs/cluster/a100.yaml is a profile, which describes a cluster; give it to",
        None,
    ),
    (
        "--config mine.yaml",
        "config: mine.yaml is a profile, which describes a cluster; give it to lockstep submit with --profile",
        "",
    ),
    (
        "--config '{partition: x, run: {name: y}}'",
        "belongs in a profile, which describes a cluster; move it there, or use -",
        None,
    ),
    ("--config '{setup: x, run: {name: y}}'", "belongs in a profile, which describes a cluster; move it there.", None),
    ("--config '{nodes: 2, seed_everything: 3}'", "is a flag and not a key of a config; remove it, and use --nodes.", None),
    ("--config digit", "config: digit does not exist; did you mean 'digits'?", None),
    ("--config", "config: needs a value: --config VALUE", None),
    ("fti", "'fti' is not a command; did you mean 'fit'?", None),
    ("trainer.max_epochs=3", "'trainer.max_epochs=3' has no dashes; write --trainer.max_epochs=3.", None),
    ("fit model.lr=3", "'model.lr=3' has no dashes; write --model.lr=3.", None),
    ("test", "ckpt_path: must be set to test: a checkpoint, or a run folder; --ckpt_path runs/NAME/ID", None),
    (
        "test --ckpt_path mine.yaml",
        "ckpt_path: mine.yaml is not in a run folder, so its config is not known; set one with",
        None,
    ),
    ("test --ckpt_path /nope", "ckpt_path: /nope does not exist; give a checkpoint or a run folder", None),
    # keys
    ("--model.learning_rate 0.1", "unknown argument of lockstep.models.Classifier; did you mean 'model.lr'?", None),
    ("--lr 0.1", "lr (value 0.1): unknown key; did you mean 'model.lr'?", None),
    ("--epochs 3", "epochs (value 3): unknown key; did you mean 'trainer.max_epochs'?", None),
    ("--seed 3", "seed (value 3): unknown key; did you mean 'seed_everything'?", None),
    ("--batch_size 32", "batch_size (value 32): unknown key; did you mean 'data.batch_size'?", None),
    ("--trainer.max_epoch 4", "trainer.max_epoch (value 4): unknown key; did you mean 'trainer.max_epochs'", None),
    ("--trainer.devices 2", "trainer.devices (value 2): cannot be set in a config; use the launcher's flag --ranks", None),
    ("--trainer.gpus 2", "trainer.gpus (value 2): cannot be set in a config; use the launcher's flag --ranks", None),
    ("--data.root x", "data.root (value x): unknown argument of lockstep.data.Digits; valid are data.augment, ", None),
    ("--checkpoint.every_n_step", "checkpoint.every_n_step: unknown key; did you mean 'checkpoint.every_n_steps'", None),
    # values
    (
        "--model.optimizer adam",
        "model.optimizer: 'adam' is neither of adamw, sgd nor the import path of a class; did you mean",
        "",
    ),
    ("--model.optimizer torch.optim.Adm", "model.optimizer: 'torch.optim.Adm' is neither", None),
    ("--model.schedule cosin", "model.schedule: 'cosin' is not valid: expected one of", None),
    ("--model.network lockstep.models.CNN", "lockstep.models.CNN does not exist; did you mean 'lockstep.models.ConvNet'", None),
    ("--model lockstep.model.Classifier", "does not exist; did you mean 'lockstep.models.Classifier'", None),
    ("--data lockstep.MNIST", "lockstep.MNIST does not exist; did you mean 'lockstep.data.MNIST'?", None),
    ("--model.lr -1", "model.lr: -1 must be greater than 0", None),
    ("--model.lr fast", "model.lr: 'fast' is not valid: expected float", None),
    ("--trainer.max_epochs ten", "trainer.max_epochs: 'ten' is not valid: expected int or null", None),
    ("--trainer.max_epochs=-5", "trainer.max_epochs: -5 must be 0 or more, or -1, which sets no limit", None),
    ("--trainer.max_steps=-2", "trainer.max_steps: -2 must be 0 or more, or -1", None),
    ("--trainer.limit_val_batches 1.5", "trainer.limit_val_batches: 1.5 must be a fraction from 0.0 to 1.0, or a whole", None),
    ("--trainer.limit_train_batches=-1", "trainer.limit_train_batches: -1 must be a fraction", None),
    ("--trainer.val_check_interval=-0.5", "trainer.val_check_interval: -0.5 must be a fraction", None),
    ("--trainer.val_check_interval 0", "trainer.val_check_interval: 0 must be 1 or more; without validation", None),
    (
        "--trainer.val_check_interval 0.5 --trainer.check_val_every_n_epoch null",
        "trainer.val_check_interval: 0.5 is a fraction of an epoch, but check_val_every_n_epoch: null counts batches",
        None,
    ),
    ("--trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch: 0 must be 1 or more", None),
    ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val: -1 must be 0 or more", None),
    ("--trainer.gradient_clip_algorithm valu", "trainer.gradient_clip_algorithm: 'valu' is not valid; did you mean", None),
    ("--trainer.max_time 1h", "trainer.max_time: '1h' is not a time; write days, hours, minutes and seconds: 00:12", None),
    ("--trainer.profiler simpel", "trainer.profiler: 'simpel' is not valid; did you mean 'simple'?", None),
    ("--trainer.accelerator tpu", "trainer.accelerator: 'tpu' is not valid; did you mean 'gpu' or 'cpu'?", None),
    ("--checkpoint.every_n_steps 0", "checkpoint.every_n_steps: 0 must be 1 or more", None),
    ("--checkpoint.keep_last 0", "checkpoint.keep_last: 0 must be 1 or more", None),
    ("--run.hang_timeout_seconds 0", "run.hang_timeout_seconds: 0.0 must be greater than 0", None),
    ("--data.num_workers=-1", "data.num_workers: -1 must be 0 or more", None),
    ("--data.batch_size 0", "data.batch_size: 0 must be 1 or more", None),
    ("--sweep trainer.max_epochs=1,-5", f"--sweep: {SUBMIT_ONLY}", "trainer.max_epochs: -5 must be 0 or more"),
    ("--strategy zero", "strategy: 'zero' is not valid: expected one of 'ddp', 'deepspeed'", None),
    ("--nodes 2 --data.batch_size 63", "the global batch size 63 is not divisible by 2 ranks; use 62 or 64", None),
    (
        "--nodes 2 --sweep data.batch_size=64,63",
        f"--sweep: {SUBMIT_ONLY}",
        "the global batch size 63 is not divisible by 2 ranks; use 62 or 64",
    ),
    (
        "--strategy deepspeed --deepspeed.offload_param cpu --sweep deepspeed.stage=3,2",
        f"--sweep: {SUBMIT_ONLY}",
        "deepspeed.offload_param: 'cpu' needs deepspeed.stage 3; it is 2.",
    ),
    ("--sweep ckpt_path=mine.yaml,/gone", f"--sweep: {SUBMIT_ONLY}", "ckpt_path: /gone does not exist"),
    ("--config imagenet --data.root /nope", "data.root: /nope is not a folder here; give the one with train/ and val/", None),
    (
        "--config imagenet --data lockstep.data.Shards --data.root .",
        "data.root: . has no .tar file in train/, val/, test/; lockstep pack makes them from folders of images",
        None,
    ),
    ("--config mnist --data.root mine.yaml/x", "data.root: mine.yaml/x does not exist, and", None),
    ("--run.name a/b", "run.name: 'a/b' must be letters, digits and . _ + = - only", None),
    ("--run.root mine.yaml/runs", "run.root: ", None),
    ("--run.root=~/mine.yaml/runs", " cannot be written", None),
    ("--run '{root: ~/mine.yaml/runs}'", " cannot be written", None),
    ("--config mnist --data.root=~/mine.yaml/x", "/mine.yaml/x does not exist, and", None),
    ("--config=~/gone.yaml", "/gone.yaml does not exist", None),
    ("--sweep data.root=~/mine.yaml/a,b --config mnist", f"--sweep: {SUBMIT_ONLY}", "/mine.yaml/a does not exist, and"),
    ("--python '~/nope'", f"--python: {SUBMIT_ONLY}", "/nope is not a program here"),
    ("--run.root open/runs", "run.root: others can write to", None),
    ("--wandb.mode onlin", "wandb.mode: 'onlin' is not valid: expected one of 'auto', 'online'", None),
]

DOORS: dict[str, Callable[[list[str]], int]] = {
    "launch/local.py": lambda words: local.main(words, "python launch/local.py"),
    "lockstep local": lambda words: cli.main(["local", *words]),
    "launch/slurm.py": lambda words: submit.main(words, "python launch/slurm.py"),
    "lockstep submit": lambda words: cli.main(["submit", *words]),
    "lockstep train": lambda words: cli.main(["train", *with_config(words)]),
}

OF_LAUNCHERS = re.compile(
    "--config .{(part|setup|nodes)|--(nodes|ranks|profile|after|resume|python|mem|time|sweep|then|folow|dryrun)"
    "|a100.yaml|mine.yaml$"
)
"""What ``lockstep train`` does not know: flags, which are those of torchrun or srun there, and profiles."""

CASES = [
    (door, arguments, expected)
    for arguments, by_local, by_submit in TYPOS
    for door in DOORS
    if (expected := by_local if by_submit is None or door not in ("launch/slurm.py", "lockstep submit") else by_submit)
    if door != "lockstep train" or not OF_LAUNCHERS.search(arguments)
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a profile, and a folder that anybody can write to."""
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine.yaml").write_text("partition: a\ntime: 24:00:00\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("door", "arguments", "expected"), CASES)
def test_a_typo_is_one_sentence_and_leaves_nothing(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    door: str,
    arguments: str,
    expected: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lockstep.trainer.local", None)
    monkeypatch.delattr(Submission, "check_with_slurm")
    assert DOORS[door](shlex.split(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("lockstep: ") and said.count("\n") == 1, said
    assert expected in said
    assert sorted(path.name for path in here.iterdir()) == ["mine.yaml", "open"]


def test_a_typo_is_told_while_slurm_does_not_answer(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sbatch", "scontrol"):
        (here / name).write_text(f"#!/bin/sh\necho $$ >{here}/{name}.pid\nexec sleep 100\n")
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    create = submit.Submission.create

    def create_late(*arguments: Any) -> Submission:
        wait_until(lambda: all((here / f"{name}.pid").exists() for name in ("sbatch", "scontrol")), 20)
        return create(*arguments)

    monkeypatch.setattr(submit.Submission, "create", create_late)
    assert submit.main(["--trainer.max_epoch", "3"]) == 2
    assert "did you mean 'trainer.max_epochs'" in capsys.readouterr().err
    for name in ("sbatch", "scontrol"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((here / f"{name}.pid").read_text()), 0)


@pytest.mark.parametrize(
    ("main", "arguments"), [(cli.main, ["jobs", "list"]), (jobs.main, ["list"]), (cli.main, ["submit"]), (submit.main, [])]
)
def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], int], arguments: list[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    for module in (jobs, submit):
        monkeypatch.setattr(module, "check_slurm_conf", interrupt)
    assert main(arguments) == 130


def test_a_command_for_several_ranks_points_to_local(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--ranks=2"]) == 2
    assert "--ranks: is a flag of lockstep local, which starts several ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "said"),
    [("w.pt", "name it w.safetensors"), ("gone/w.safetensors", "--out: gone is not a folder here; make it first.")],
)
def test_where_an_export_is_written(here: Path, capsys: pytest.CaptureFixture[str], out: str, said: str) -> None:
    assert cli.main(["export", ".", "--out", out]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("door", [["launch/local.py"], ["launch/slurm.py"], ["-m", "lockstep.cli", "local"]], ids=" ".join)
@pytest.mark.parametrize("arguments", ["--model.optimizer adam", "--data.batch_size 63 --nodes 2"])
def test_a_typo_costs_no_import_of_torch(
    here: Path, tmp_path_factory: pytest.TempPathFactory, door: list[str], arguments: str
) -> None:
    blocked = tmp_path_factory.mktemp("blocked")
    for name in ("torch", "lightning", "numpy"):
        (blocked / f"{name}.py").write_text("raise ImportError('not before the checks')\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(blocked), str(REPO / "src")])}
    script = [str(REPO / door[0])] if door[0].endswith(".py") else door
    done = subprocess.run([sys.executable, *script, *arguments.split()], env=env, cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(("lockstep: model.optimizer: 'adam'", "lockstep: data.batch_size: the global batch size 63"))
    assert sorted(path.name for path in here.iterdir()) == ["mine.yaml", "open"]
