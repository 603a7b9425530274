"""``strategy: deepspeed``: ZeRO, through lightning's strategy on GPUs, and on CPUs over gloo to test and debug."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Optimizer

from lockstep.checkpoint import ShardedState, State, parameter_names
from lockstep.compat.deepspeed import patch_nvme
from lockstep.config import DeepSpeedOptions, deepspeed_config
from lockstep.core import UsageError
from lockstep.data import DataSharding
from lockstep.distributed import WorldEnvironment
from lockstep.strategies.base import LockstepStrategy
from lockstep.strategies.deepspeed_ops import select_accelerator
from lockstep.strategies.deepspeed_state import capture_shards, restore_shards


class DeepSpeed(LockstepStrategy, DeepSpeedStrategy):
    """ZeRO over the ranks of the world, also over a single one.

    Args:
        devices: Of the ranks of this node.
        sharding: The world, and the order of its data.
        options: What is shared out, and where it is kept.
        timeout: How long a collective waits.
        folder: Of this rank's own, below ``options.nvme_path``; None where nothing is offloaded to NVMe.
    """

    def __init__(
        self,
        devices: list[torch.device],
        sharding: DataSharding,
        options: DeepSpeedOptions,
        timeout: timedelta,
        folder: Path | None,
    ) -> None:
        self.on_gpu = devices[0].type == "cuda"
        select_accelerator(devices[0])
        super().__init__(
            config=deepspeed_config(options, folder),
            parallel_devices=devices,
            cluster_environment=WorldEnvironment(sharding.world),
            process_group_backend="nccl" if self.on_gpu else "gloo",
            timeout=timeout,
        )
        self.sharding = sharding
        self.folder = folder
        self._names: list[str] = []

    def setup_environment(self) -> None:
        # lightning's own refuses the CPU; everything else of it works there.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed

        if not self.on_gpu:
            # Which ops could be built: none is needed, and one for inference would take a compiler and half a minute.
            vars(deepspeed.ops)["__compatible_ops__"] = {}
            # DeepSpeed asks whether the CPU has instructions for float16; torch computes with it without them, slowly.
            vars(deepspeed.get_accelerator())["is_fp16_supported"] = lambda: True
        if self.folder is not None:
            patch_nvme()
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        if self.on_gpu:
            # DeepSpeed takes the GPU of that number; where Slurm shows each rank its own alone, that is 0.
            os.environ["LOCAL_RANK"] = str(self.root_device.index)

    @property
    def root_device(self) -> torch.device:
        return super().root_device if self.on_gpu else torch.device("cpu", 0)

    def shards(self) -> State | None:
        assert self.lightning_module is not None
        return capture_shards(self.deepspeed_engine, self.lightning_module)

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        # lightning leaves a section of a user's own as it is, and so off.
        for section, precisions in (("fp16", ("16-mixed", "16-true")), ("bf16", ("bf16-mixed", "bf16-true"))):
            if section in self.config:
                self.config[section]["enabled"] = self.precision_plugin.precision in precisions

    @property
    def handles_gradient_accumulation(self) -> bool:
        """No: DeepSpeed counts batches over the whole run, lightning in each epoch, and takes a step with what is left over."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: ``backward`` tells DeepSpeed what to do with the gradients of a batch; stages 2 and 3 take no other way."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self.deepspeed_engine.set_gradient_accumulation_boundary(not trainer.fit_loop._should_accumulate())
        # lightning divides the loss by the batches that are accumulated, and DeepSpeed does it once more.
        batches = trainer.accumulate_grad_batches
        return super().backward(closure_loss if batches == 1 else closure_loss * batches, optimizer, *args, **kwargs)

    def global_grad_norm(self) -> Tensor | float | None:
        norm: Tensor | float | None = self.deepspeed_engine.get_global_grad_norm()
        return norm

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters(remove_duplicate=False))
        for name, value in sorted(self.lightning_module.state_dict().items()):
            if hasattr(parameters.get(name), "ds_tensor"):
                with deepspeed.zero.GatheredParameters([parameters[name]]):
                    yield name, parameters[name].detach()
            else:
                yield name, value

    def init_deepspeed(self) -> None:
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            # DeepSpeed takes no other order in memory, such as channels-last; images and activations keep theirs.
            parameter.data = parameter.data.contiguous()
        super().init_deepspeed()

    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._setup_model_and_optimizer(*args, **kwargs)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"deepspeed.config: DeepSpeed does not take {name} ({first['input']!r}) in {error.title}: {first['msg']}."
            ) from None

    def _init_optimizers(self) -> Any:
        assert self.lightning_module is not None
        try:
            optimizer, schedule = super()._init_optimizers()
        except (MisconfigurationException, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "multiple optimizers" not in str(error):
                raise
            name = type(self.lightning_module).__name__
            raise UsageError(
                f"model: {name} has several optimizers or schedules, and ZeRO takes one; use strategy ddp."
            ) from None
        names = parameter_names(self.lightning_module)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = [names[id(p)] for p in stepped]
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        # DeepSpeed takes a whole bucket of memory, or two, however small the model is.
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], sum(getattr(p, "ds_numel", p.numel()) for p in stepped))
        return optimizer, schedule

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: it is in the shards."""
        return {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is not in the shards: buffers, and parameters that are neither shared out nor stepped."""
        assert self.lightning_module is not None
        stepped = self._stepped()
        parameters = self.lightning_module.named_parameters(remove_duplicate=False)
        first = parameter_names(self.lightning_module)
        in_shards = {name for name, p in parameters if first[id(p)] in stepped or hasattr(p, "ds_tensor")}
        return {name: value for name, value in self.lightning_module.state_dict().items() if name not in in_shards}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        module = self.lightning_module
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        parameters: dict[str, Any] = dict(module.named_parameters())
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        whole = {name: value for name, value in checkpoint["state_dict"].items() if name in parameters}
        is_fitting = module.trainer.state.fn == TrainerFn.FITTING
        saved = ShardedState.of(Path(checkpoint_path).parent)
        if saved is None:
            states = (checkpoint.get("optimizer_states") or [None]) if is_fitting else [None]
            saved = ShardedState.from_full_state(whole, states[0], self._names)
        saved.include(whole)
        saved.check_same_model({name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()})
        if is_fitting:
            restore_shards(self.deepspeed_engine, module, saved)
            self._put_weights(saved, [name for name in parameters if name not in self._stepped()])
        else:
            self._put_weights(saved, list(parameters))
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in names}
        return checkpoint

    def _stepped(self) -> set[str]:
        """Names of the parameters that the optimizer steps; it may have been given frozen ones too."""
        assert self.lightning_module is not None
        return {name for name, p in self.lightning_module.named_parameters() if p.requires_grad} & set(self._names)

    def _put_weights(self, saved: ShardedState, names: Sequence[str]) -> None:
        import deepspeed

        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name in names:
                gathered = [parameters[name]] if hasattr(parameters[name], "ds_tensor") else []
                with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
                    parameters[name].copy_(saved.whole(name))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)
