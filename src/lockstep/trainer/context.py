"""What is decided before an attempt starts."""

import sys
from dataclasses import dataclass
from datetime import timedelta
from os import environ

import torch
from jsonargparse import ArgumentParser, Namespace

from lockstep.core import World
from lockstep.distributed import broadcast_from_rank_zero, enable_flight_recorder, init_process_group, local_devices
from lockstep.runs import Run
from lockstep.trainer.build import resolve_precision


@dataclass(frozen=True)
class RunContext:
    """One attempt of a run, as one rank sees it. Made once, and handed down whole.

    Attributes:
        command: fit, validate, test or predict.
        parser: Builds the classes that ``config`` names.
        config: What ``parse_config`` returned, with the precision resolved.
        world: The place of this rank.
        devices: One for each rank of this node.
        run: The run folder.
        attempt: Number of this start of the run.
    """

    command: str
    parser: ArgumentParser
    config: Namespace
    world: World
    devices: list[torch.device]
    run: Run
    attempt: int

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.devices[self.world.local_rank]

    @classmethod
    def create(
        cls,
        command: str,
        parsed: tuple[ArgumentParser, Namespace],
        world: World,
        run: Run | None = None,
        attempt: int = 1,
    ) -> "RunContext":
        """Select the devices, connect the ranks and, where no launcher has done it, make the run folder.

        Every rank must call.

        Args:
            command: fit, validate, test or predict.
            parsed: What ``parse_config`` returned.
            world: The place of this rank.
            run: The run folder; rank zero makes one by default.
            attempt: Number of this start of the run.

        Raises:
            UsageError: There are too few GPUs, or the run folder cannot be made.
        """
        parser, config = parsed
        devices = local_devices(world, config.trainer.accelerator)
        config.trainer.precision = resolve_precision(config.trainer.precision, devices[world.local_rank])
        if run is not None:
            enable_flight_recorder(run.log(attempt, 0).parent, environ)
        timeout = timedelta(minutes=config.distributed.timeout_minutes)
        init_process_group(world, devices[world.local_rank], timeout, alone=config.strategy == "deepspeed")
        if run is None:
            run, attempt = broadcast_from_rank_zero(
                lambda: Run.start(config.run.root, config.run.name, sys.argv, world.nodes, world.local_size), world
            )
        return cls(command, parser, config, world, devices, run, attempt)
