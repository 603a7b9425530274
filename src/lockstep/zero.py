"""``strategy: deepspeed``: ZeRO, through lightning's strategy on GPUs, and on CPUs over gloo to test and debug."""

import os
import platform
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lockstep.errors import UsageError
from lockstep.group import WorldEnvironment
from lockstep.options import DeepSpeedOptions
from lockstep.order import Sharding
from lockstep.ordered import Ordered
from lockstep.shards import Saved, State, put_shards, take_shards
from lockstep.zero_config import deepspeed_config


class DeepSpeed(Ordered, DeepSpeedStrategy):
    """ZeRO over the ranks of the world, also over a single one.

    Args:
        devices: Of the ranks of this node.
        sharding: The world, and the order of its data.
        options: What is shared out, and where it is kept.
        timeout: How long a collective waits.
    """

    def __init__(self, devices: list[torch.device], sharding: Sharding, options: DeepSpeedOptions, timeout: timedelta) -> None:
        self.on_gpu = devices[0].type == "cuda"
        if (
            "nvme" in (options.offload_optimizer, options.offload_parameters)
            and options.nvme_path is not None
            and not options.nvme_path.is_dir()
        ):
            raise UsageError(f"deepspeed.nvme_path: {options.nvme_path} is no folder on {platform.node()}.")
        if not self.on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        super().__init__(
            config=deepspeed_config(options),
            parallel_devices=devices,
            cluster_environment=WorldEnvironment(sharding.world),
            process_group_backend="nccl" if self.on_gpu else "gloo",
            timeout=timeout,
        )
        self.sharding = sharding

    def setup_environment(self) -> None:
        # lightning's own refuses the CPU; everything else of it works there.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed

        if not self.on_gpu:
            # Which ops could be built: none is needed, and one for inference would take a compiler and half a minute.
            vars(deepspeed.ops)["__compatible_ops__"] = {}
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return super().root_device if self.on_gpu else torch.device("cpu", 0)

    def shards(self) -> State | None:
        assert self.lightning_module is not None
        return take_shards(self.deepspeed_engine, self.lightning_module)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # lightning divides the loss by the batches that are accumulated, and DeepSpeed does it once more.
        assert self.lightning_module is not None
        batches = self.lightning_module.trainer.accumulate_grad_batches
        return super().backward(closure_loss if batches == 1 else closure_loss * batches, optimizer, *args, **kwargs)

    def global_norm(self) -> Tensor | float | None:
        norm: Tensor | float | None = self.deepspeed_engine.get_global_grad_norm()
        return norm

    def whole_weights(self) -> Mapping[str, Tensor]:
        import deepspeed

        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        weights: dict[str, Tensor] = {}
        for name, value in self.lightning_module.state_dict().items():
            if hasattr(parameters.get(name), "ds_tensor"):
                with deepspeed.zero.GatheredParameters([parameters[name]]):
                    weights[name] = parameters[name].detach().to("cpu", copy=True)
            else:
                weights[name] = value
        return weights

    def _init_optimizers(self) -> Any:
        optimizer, schedule = super()._init_optimizers()
        assert self.lightning_module is not None
        names = {id(p): name for name, p in self.lightning_module.named_parameters()}
        self._names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        return optimizer, schedule

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: it is in the shards."""
        return {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is not in the shards: buffers, and frozen parameters that are not shared out."""
        assert self.lightning_module is not None
        in_shards = {name for name, p in self.lightning_module.named_parameters() if p.requires_grad or hasattr(p, "ds_tensor")}
        return {name: value for name, value in self.lightning_module.state_dict().items() if name not in in_shards}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        module = self.lightning_module
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        shapes = {
            name: getattr(p, "ds_shape", p.shape)
            for name, p in module.named_parameters()
            if p.requires_grad or hasattr(p, "ds_tensor")
        }
        saved = Saved.of(Path(checkpoint_path).parent)
        if saved is None:
            weights = {name: value for name, value in checkpoint["state_dict"].items() if name in shapes}
            states = checkpoint.get("optimizer_states") or [None]
            saved = Saved.of_whole(weights, states[0], getattr(self, "_names", []))
        saved.refuse_other_model(shapes)
        if module.trainer.state.fn == TrainerFn.FITTING:
            put_shards(self.deepspeed_engine, module, saved)
        else:
            self._put_weights(saved)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in shapes}
        return checkpoint

    def _put_weights(self, saved: Saved) -> None:
        import deepspeed

        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name in saved.shapes:
                gathered = [parameters[name]] if hasattr(parameters[name], "ds_tensor") else []
                with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
                    parameters[name].copy_(saved.whole(name))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)
