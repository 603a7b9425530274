"""The context of an attempt on one rank: config, world, devices, run folder."""

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from os import environ

import torch
from jsonargparse import ArgumentParser, Namespace

from lockstep.core import World, shell_command
from lockstep.distributed import (
    STARTING_PHASES,
    broadcast_from_rank_zero,
    enable_flight_recorder,
    init_process_group,
    local_devices,
)
from lockstep.runs import Ownership, Run
from lockstep.runs import report_phase as write_phase


@dataclass(frozen=True)
class RunContext:
    """One attempt of a run, as one rank sees it.

    Attributes:
        command: fit, validate, test or predict.
        parser: Instantiates the classes that ``config`` names.
        config: What ``parse_config`` returned, with the precision resolved.
        devices: One for each rank of this node.
        attempt: Number of this start of the run.
        report_phase: Reports the phase that this rank enters to the process that forked it.
    """

    command: str
    parser: ArgumentParser
    config: Namespace
    world: World
    devices: list[torch.device]
    run: Run
    attempt: int
    report_phase: Callable[[str], None]

    def enter(self, phase: str) -> None:
        """Report that this rank enters a phase, one of ``distributed.phases.PHASES``; on rank zero also in ``status.json``."""
        self.report_phase(phase)
        if self.world.is_rank_zero and phase in STARTING_PHASES:
            write_phase(self.run, self.attempt, phase)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.devices[self.world.local_rank]

    @property
    def one_rank_command(self) -> str:
        """A shell command that starts a new run of the same config with one rank on one machine."""
        command = () if self.command == "fit" else (self.command,)
        return shell_command("local", *command, "--config", self.run.config)

    @cached_property
    def ownership(self) -> Ownership:
        """The claim of this attempt on the run."""
        return Ownership(self.run, self.attempt)

    @classmethod
    def create(
        cls,
        command: str,
        parsed: tuple[ArgumentParser, Namespace],
        world: World,
        run: Run | None = None,
        attempt: int = 1,
        report_phase: Callable[[str], None] = lambda phase: None,
    ) -> "RunContext":
        """Select the devices, connect the ranks and, unless a launcher has done so, create the run folder.

        Every rank must call this. ``parsed`` is what ``parse_config`` returned.

        Raises:
            UsageError: There are too few GPUs, or the run folder cannot be created.
        """
        parser, config = parsed
        options = config.distributed
        devices = local_devices(world, config.trainer.accelerator, options.backend, environ)
        device = devices[world.local_rank]
        if not torch.cuda.device_count():  # with Lightning's value, each optimizer step loads NVML again
            environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
        if run is not None:
            enable_flight_recorder(run.attempt_folder(attempt), environ)
            if world.is_rank_zero:
                write_phase(run, attempt, "rendezvous")
        timeout = timedelta(minutes=options.timeout_minutes)
        init_process_group(world, device, timeout, alone=config.strategy == "deepspeed", backend=options.backend)
        if config.trainer.precision == "auto":  # all ranks need the same, even if their GPUs differ
            has_bf16 = device.type == "cuda" and broadcast_from_rank_zero(lambda: _has_bf16(device), world)
            config.trainer.precision = "bf16-mixed" if has_bf16 else "32-true"
        if config.seed_everything is True:
            config.seed_everything = broadcast_from_rank_zero(lambda: secrets.randbelow(2**32), world)
            if config.data is not None and "seed" in config.data.get("init_args", {}):
                config.data.init_args.seed = config.seed_everything
        if run is None:
            run, attempt = broadcast_from_rank_zero(
                lambda: Run.start(config.run.root, config.run.name, sys.argv, world.nodes, world.local_size), world
            )
        return cls(command, parser, config, world, devices, run, attempt, report_phase)


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16: from compute capability 8.0, as in ``torch.cuda.is_bf16_supported``."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
