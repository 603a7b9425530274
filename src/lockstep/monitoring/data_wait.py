"""Find the bottleneck of the input while training waits for data, and say what to change."""

import os
from dataclasses import dataclass, fields

LIMIT = 0.1
"""Share of the time that training may wait for data."""

SECONDS = 60.0
"""How long training must wait too much before a line says so."""


@dataclass(frozen=True)
class InputTimes:
    """Where the time of the input goes, in seconds since the last such report.

    Attributes:
        elapsed: Time of training.
        waited: Time in which the training process waited for the next batch.
        copied: Time in which it moved batches to the device.
        busy: Time in which the processes that prepare samples were busy, summed over all of them.
        read: Part of ``busy`` in which they waited for files, if the data set measures it.
        samples: Samples that they prepared.
    """

    elapsed: float = 0.0
    waited: float = 0.0
    copied: float = 0.0
    busy: float = 0.0
    read: float = 0.0
    samples: float = 0.0

    def __add__(self, other: "InputTimes") -> "InputTimes":
        return InputTimes(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


class DataWaitAdvisor:
    """Collect ``InputTimes`` while training waits too much.

    Args:
        cpus: CPUs of this rank.
    """

    def __init__(self, cpus: int | None = None) -> None:
        self._cpus = cpus or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._sum = InputTimes()
        self._said: set[str] = set()

    def update(self, times: InputTimes, workers: int) -> str | None:
        """Return a line about the bottleneck if training has waited too much for a minute, once for each cause.

        Args:
            times: The times of the steps since the last call.
            workers: Processes that prepare samples for this rank; 0 if the training process prepares them.
        """
        if times.waited + times.copied <= LIMIT * times.elapsed:
            self._sum = InputTimes()
            return None
        self._sum += times
        if self._sum.elapsed < SECONDS:
            return None
        cause, line = _diagnose(self._sum, workers, self._cpus)
        self._sum = InputTimes()
        if cause in self._said:
            return None
        self._said.add(cause)
        return line


def _diagnose(times: InputTimes, workers: int, cpus: int) -> tuple[str, str]:
    share = (times.waited + times.copied) / times.elapsed
    begin = f"training has waited {share:.0%} of the last {times.elapsed:.0f} s for data"
    if times.copied > times.waited:
        remedy = "return tensors, in a DataLoader with pin_memory=True, and as uint8"
        return "copy", f"{begin}: the bottleneck is the copy to the device ({times.copied / times.elapsed:.0%}); {remedy}."
    if not times.samples:
        return "loader", f"{begin}; lockstep cannot measure where, as the loader is not its own: give that more workers."
    each, read = 1000 * times.busy / times.samples, 1000 * times.read / times.samples
    use = times.busy / times.elapsed / max(1, workers)
    measured = f"{each:.1f} ms for a sample, {read:.1f} of them to read it" if read else f"{each:.1f} ms for a sample"
    if read > each / 2:
        remedy = "pack the files (lockstep pack), copy them to a disk of each node, or raise data.num_workers"
        return "disk", f"{begin}: the bottleneck is the disk ({measured}); {remedy}."
    if not workers or (workers < cpus - 1 and use > 0.5):
        alone = f"the training process itself prepares samples, on one of {cpus} CPUs"
        who = f"too few workers, {workers} for {cpus} CPUs" if workers else alone
        remedy = f"set data.num_workers to {max(1, cpus - 1)}"
        if cpus < 3 and not workers:
            remedy = "request more CPUs (--cpus-per-rank) and set data.num_workers"
        return "workers", f"{begin}: {who} ({measured}); {remedy}."
    if use > 0.5:
        remedy = (
            "request more CPUs (--cpus-per-rank), pack smaller images (lockstep pack), or decode on the GPU (data.decode gpu)"
        )
        return "decode", f"{begin}: the bottleneck is decoding ({measured}, {workers} workers on {cpus} CPUs); {remedy}."
    remedy = "the collate_fn, large batches between processes, or other processes on its CPUs; request more (--cpus-per-rank)"
    return "transfer", f"{begin}, though its {workers} workers are busy for only {use:.0%} ({measured}): look at {remedy}."
