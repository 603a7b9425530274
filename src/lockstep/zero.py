"""``strategy: deepspeed``: ZeRO, through lightning's strategy on GPUs, and on CPUs over gloo to test and debug."""

import json
import os
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
from lockstep.shards import WEIGHT, Saved, State, put_shards, take_shards

_KNOWN = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
    "fp16.enabled": "trainer.precision",
    "bf16.enabled": "trainer.precision",
    "optimizer": "model.optimizer",
    "scheduler": "model.schedule",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
    "zero_optimization.overlap_comm": "deepspeed.overlap_comm",
    "zero_optimization.reduce_bucket_size": "deepspeed.bucket_size",
}
"""Keys of DeepSpeed's JSON that say what a key of ours says."""


def deepspeed_config(options: DeepSpeedOptions) -> dict[str, Any]:
    """DeepSpeed's own config: what the options say, and a user's JSON with what they do not.

    Raises:
        UsageError: The options contradict each other, or the JSON says what another key says.
    """
    zero: dict[str, Any] = {
        "stage": options.stage,
        "overlap_comm": options.overlap_comm,
        "reduce_bucket_size": options.bucket_size,
        "allgather_bucket_size": options.bucket_size,
        "contiguous_gradients": True,
    }
    for key, place, name in (
        ("offload_optimizer", options.offload_optimizer, "offload_optimizer"),
        ("offload_param", options.offload_parameters, "offload_parameters"),
    ):
        if place == "none":
            continue
        if name == "offload_parameters" and options.stage != 3:
            raise UsageError(f"deepspeed.offload_parameters: {place!r} needs deepspeed.stage 3; it is {options.stage}.")
        if place == "nvme" and options.stage != 3:
            raise UsageError(f"deepspeed.{name}: 'nvme' needs deepspeed.stage 3; it is {options.stage}.")
        zero[key] = {"device": place}
        if place == "nvme":
            if options.nvme_path is None or not options.nvme_path.is_dir():
                raise UsageError(f"deepspeed.nvme_path: {options.nvme_path} is no folder; give one on a local disk.")
            zero[key]["nvme_path"] = str(options.nvme_path)
    own = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "activation_checkpointing": {
            "partition_activations": options.partition_activations,
            "cpu_checkpointing": options.cpu_checkpointing,
        },
    }
    return _merged(own, _read(options.config)) if options.config else own


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"deepspeed.config: {path} cannot be read as JSON ({reason}).") from None
    if not isinstance(content, dict):
        raise UsageError(f"deepspeed.config: {path} must hold keys with values.")
    for name, ours in _KNOWN.items():
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            raise UsageError(f"deepspeed.config: {name} ({value!r}) in {path} is decided by {ours}; take it out of the file.")
    return content


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        merged[key] = _merged(merged[key], value) if isinstance(merged.get(key), dict) and isinstance(value, dict) else value
    return merged


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
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return super().root_device if self.on_gpu else torch.device("cpu", 0)

    def shards(self) -> State | None:
        assert self.lightning_module is not None
        return take_shards(self.deepspeed_engine, self.lightning_module)

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
            self._put_weights(saved, shapes)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in shapes}
        return checkpoint

    def _put_weights(self, saved: Saved, shapes: Mapping[str, torch.Size]) -> None:
        import deepspeed

        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, shape in shapes.items():
                value = saved.slice(name, WEIGHT, 0, shape.numel()).reshape(shape)
                gathered = [parameters[name]] if hasattr(parameters[name], "ds_tensor") else []
                with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
                    parameters[name].copy_(value)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)
