"""Select the GPU of each rank.

A rank uses the GPU with the number of its local rank among those that CUDA shows to its process. CUDA reads
CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER when it is initialized, so they are set before.
"""

import logging
from collections.abc import Mapping, MutableMapping

import torch

from lockstep.compat.nvml import may_have_gpus
from lockstep.compat.torch import forked_after_cuda
from lockstep.core import RunError, UsageError, World, count

log = logging.getLogger(__name__)


def local_devices(world: World, accelerator: str, backend: str, env: MutableMapping[str, str]) -> list[torch.device]:
    """Select the device of each rank of this node, by local rank; ``auto`` is GPUs if each rank can have one, else the CPU.

    With the ``backend`` gloo, ranks share GPUs if there are too few. Call this before CUDA is initialized: it sets in ``env``
    which GPUs this process sees, and numbers them as Slurm and nvidia-smi do, not the fastest first.

    Raises:
        UsageError: There are fewer GPUs than ranks, CUDA was initialized before the ranks were forked, or the accelerator or
            the backend is not supported.
        RunError: This node has lost GPUs that Slurm has given to the job.
    """
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UsageError(f"trainer.accelerator: {accelerator!r} is not valid; valid are auto, cpu, gpu and cuda.")
    if accelerator != "cpu" and may_have_gpus() and forked_after_cuda():
        raise UsageError(
            "A module that the config names initializes CUDA when it is imported, and then this process cannot fork ranks; "
            "create tensors on the GPU, and count GPUs, in the LightningModule instead."
        )
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    has_own = _show_own_gpus(world, env)
    visible = torch.cuda.device_count()
    # A cluster that binds each task to one GPU numbers every one of them 0.
    bound = visible == 1 and (has_own or world.launcher in ("slurm", "submitit"))
    if accelerator == "auto":
        accelerator = "gpu" if bound or visible >= world.local_size else "cpu"
        if accelerator == "cpu":
            _check_granted(world, visible, env)
    if accelerator == "cpu":
        if backend == "nccl":
            raise UsageError("distributed.backend: 'nccl' needs GPUs, and the ranks use CPUs; remove it, or use gloo.")
        return [torch.device("cpu")] * world.local_size
    if not bound and visible < world.local_size and not (visible and backend == "gloo"):
        raise UsageError(
            f"{count(world.local_size, 'rank')} on this node, but visible: {count(visible, 'GPU')}; "
            f"{'use fewer ranks or ' if world.local_size > 1 and visible else 'use '}--trainer.accelerator cpu."
        )
    return [torch.device("cuda", 0 if bound else index % visible) for index in range(world.local_size)]


def _show_own_gpus(world: World, env: MutableMapping[str, str]) -> bool:
    """Hide the GPUs of other simulated nodes, and the MIG devices of other ranks: a process can use only one MIG device.

    Simulated nodes have no GPUs if there are fewer GPUs than ranks. Returns whether this rank sees only its own MIG device.
    """
    listed = env.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",")] if listed else []
    has_mig = listed.startswith("MIG-")
    if world.launcher == "local" and world.nodes > 1:
        visible = len(names) if has_mig else torch.cuda.device_count()  # of MIG devices, CUDA counts one
        if not visible:
            return False
        names = names[:visible] or [str(index) for index in range(visible)]
        first = world.node_rank * world.local_size
        names = names[first : first + world.local_size] if world.size <= visible else []
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    if not has_mig or len(names) < world.local_size:
        return False
    env["CUDA_VISIBLE_DEVICES"] = names[world.local_rank]
    return True


def _check_granted(world: World, visible: int, env: Mapping[str, str]) -> None:
    """Warn if a run uses CPUs although there are GPUs; raise RunError if the reason is that GPUs are lost."""
    granted = env.get("SLURM_GPUS_ON_NODE", "")
    if granted.isdigit() and int(granted) >= world.local_size:
        text = f"Slurm has given {count(int(granted), 'GPU')} of this node to the job, but CUDA sees {visible or 'none'}"
        if may_have_gpus():
            raise RunError(f"{text}; see nvidia-smi and the kernel's log on this node, or use --trainer.accelerator cpu.")
        if world.is_rank_zero:
            log.warning("%s; training on the CPU", text)
    elif visible and world.is_rank_zero:
        log.warning(
            "%s on this node, but visible: %s; training on the CPU", count(world.local_size, "rank"), count(visible, "GPU")
        )
