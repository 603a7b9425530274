"""Start runs of lockstep in forks, as ``lockstep local`` does, and compare them.

The process of a row must not use CUDA: it forks the runs.
"""

import json
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from support.runs import REPO, Outcome

from gpu.harness import Line, Place
from lockstep.cli import local
from lockstep.monitoring import report

DIGITS = (
    *("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
    *("--run.test_after_fit", "false", "--wandb.mode", "disabled", "--checkpoint.every_n_steps", "7"),
)
"""20 steps of a small convolutional network on real images; saved after steps 7, 14 and 20."""

FLAT = ("--model.network", "lockstep.models.MLP", "--model.network.hidden", "[64,96]")
"""The network of the runs that are compared between strategies."""

EXACT = ("--trainer.deterministic", "true", "--trainer.precision", "32-true")
"""torch's deterministic kernels, and CUBLAS_WORKSPACE_CONFIG, which Lightning sets with them."""


def launch(place: Place, *arguments: str, seconds: float = 120.0) -> Outcome:
    """Run ``lockstep local`` in a fork; the run folder is below the folder of the row."""
    root = place.folder / "runs"
    before = set(root.glob("*/*"))
    given = [*arguments, "--trainer.accelerator", place.accelerator, "--run.root", str(root)]
    print("$ lockstep local", *given, flush=True)
    process = get_context("fork").Process(target=_main, args=(given,))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        print(f"not finished after {seconds:.0f} s")
    made = [folder for folder in root.glob("*/*") if folder not in before]
    assert process.exitcode is not None
    return Outcome(process.exitcode, made[0] if made else root)


def _main(arguments: list[str]) -> None:
    report.draw = lambda run: None  # the picture takes longer than the run
    sys.exit(local.main(arguments))


def resume(place: Place, run: Outcome, *arguments: str) -> Outcome:
    """Resume a run."""
    return Outcome(launch(place, "--resume", str(run.folder), *arguments).status, run.folder)


def in_fork(function: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Call ``function`` in a fork, which may use CUDA, and return its result.

    Raises:
        RuntimeError: It has raised, crashed or taken too long.
    """
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def child() -> None:
        sender.send(function())

    process = get_context("fork").Process(target=child)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"no result after {seconds:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join(5)
        raise RuntimeError(f"the process ended with exit status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def inspected(place: Place, name: str, *arguments: str) -> tuple[Outcome, dict[str, Any]]:
    """Run with an ``Inspector``, and return what it has found."""
    file = place.folder / f"{name}.json"
    options = ("--trainer.callbacks+=gpu.callbacks.Inspector", f"--trainer.callbacks.file={file}")
    run = launch(place, *arguments, *options)
    return run, json.loads(file.read_text()) if file.exists() else {}


def difference(run: Outcome, other: Outcome) -> str:
    """How the weights of two runs differ: equal bit for bit, or the largest absolute difference."""
    if run.result["weights_sha256"] == other.result["weights_sha256"]:
        return "equal bit for bit"
    weights, others = run.weights, other.weights
    largest = max(float((weights[name].float() - value.float()).abs().max()) for name, value in others.items() if value.numel())
    return f"not bit-equal: weights differ by up to {largest:.2g}"


def killed_and_resumed(place: Place, name: str, *arguments: str, exact: bool = True, rank: int = 0) -> Line:
    """Kill a rank with SIGKILL after step 17, resume from step 14, and compare with an undisturbed run."""
    from support.faults import fault

    undisturbed = launch(place, *arguments)
    began = time.monotonic()
    killed = launch(place, *arguments, *fault(place.folder / f"{name}-killed", "SIGKILL", step=17, rank=rank))
    if killed.status == 0 or undisturbed.status != 0:
        return Line(name, f"exit statuses: undisturbed {undisturbed.status}, killed {killed.status}", False)
    resumed = resume(place, killed)
    took = time.monotonic() - began
    if resumed.status != 0:
        return Line(name, f"the resumed run ended with exit status {resumed.status}", False)
    found = difference(resumed, undisturbed)
    return Line(
        name, f"killed at step 17, resumed at 14: {found} ({took:.0f} s)", found == "equal bit for bit" if exact else None
    )
