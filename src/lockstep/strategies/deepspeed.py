"""``strategy: deepspeed``: ZeRO through Lightning's strategy, on GPUs, and over gloo on CPUs for tests and debugging."""

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
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.compat.deepspeed import ZeroOptimizer, full_shape, gathered, is_partitioned, patch_nvme, prepare_cpu
from lockstep.compat.lightning import LightningDeepSpeedStrategy, is_accumulating
from lockstep.config import DeepSpeedOptions, deepspeed_config
from lockstep.core import UsageError
from lockstep.data.loading import DataSharding
from lockstep.distributed import WorldEnvironment, gather
from lockstep.strategies.base import LockstepStrategy
from lockstep.strategies.deepspeed_ops import select_accelerator
from lockstep.strategies.sharded_state import (
    INDEX_FILE,
    WEIGHT,
    ShardedState,
    State,
    join_places,
    parameter_names,
    shard_file,
)


class DeepSpeed(LockstepStrategy, LightningDeepSpeedStrategy):
    """ZeRO over all ranks of the world, which may be a single one; ``folder`` is this rank's own, for offload to NVMe."""

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
        self.sharding, self.folder = sharding, folder
        self._names: list[str] = []
        self._indexed: list[bool] = []
        self._slices: dict[str, State] = {}

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # Lightning's own refuses CPUs

    def setup_distributed(self) -> None:
        if not self.on_gpu:
            prepare_cpu()
        if self.folder is not None:
            patch_nvme()
        reset_seed()
        self.set_world_ranks()
        self.init_process_group()
        if self.on_gpu:
            # DeepSpeed uses the GPU with this index: 0 if Slurm shows each rank only its own GPU.
            os.environ["LOCAL_RANK"] = str(self.root_device.index)

    @property
    def root_device(self) -> torch.device:
        return super().root_device if self.on_gpu else torch.device("cpu", 0)

    def on_unfrozen(self, names: Sequence[str]) -> None:
        raise UsageError(
            f"strategy: deepspeed shards the parameters that require a gradient before training, and {names[0]} begins to "
            "require one later; let it do so from the start, or use strategy ddp."
        )

    is_partitioned = True

    @property
    def is_on_disk(self) -> bool:
        return self.folder is not None

    def shards(self) -> State:
        zero, world = ZeroOptimizer(self.deepspeed_engine), self.sharding.world
        shard, places = _capture_shard(zero, self.module)
        # The partition changes only with what is trainable, on all ranks alike.
        if self._indexed != (trainable := [p.requires_grad for p in self.module.parameters()]):
            by_rank = gather(places, world)
            shapes = {name: full_shape(p) for name, p in self.module.named_parameters()}
            self._slices = join_places(by_rank, shapes) if world.is_rank_zero else {}
            self._indexed = trainable
        index = {INDEX_FILE: _capture_index(zero, self.module, self._slices)} if world.is_rank_zero else {}
        return {shard_file(world.rank): shard, **index}

    def format_config(self) -> None:
        super().format_config()
        assert isinstance(self.config, dict)
        # Lightning does not set ``enabled`` in a section that the user's JSON contains.
        for section, precisions in (("fp16", ("16-mixed", "16-true")), ("bf16", ("bf16-mixed", "bf16-true"))):
            if section in self.config:
                self.config[section]["enabled"] = self.precision_plugin.precision in precisions

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: DeepSpeed counts batches over the whole run; Lightning counts per epoch and steps with the remainder."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: ``backward`` tells DeepSpeed when to accumulate, which is the only way with stages 2 and 3."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        trainer = self.module.trainer
        self.deepspeed_engine.set_gradient_accumulation_boundary(not is_accumulating(trainer))
        # Lightning divides the loss by the number of accumulated batches, and DeepSpeed does so again.
        batches = trainer.accumulate_grad_batches
        return super().backward(closure_loss if batches == 1 else closure_loss * batches, optimizer, *args, **kwargs)

    def global_grad_norm(self) -> Tensor | float | None:
        norm: Tensor | float | None = self.deepspeed_engine.get_global_grad_norm()
        return norm

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in super().replicated_weights() if not is_partitioned(value))

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name, value in sorted(self.module.state_dict().items()):
            parameter = parameters.get(name)
            with gathered(parameter):
                yield name, parameter.detach() if parameter is not None and is_partitioned(parameter) else value

    def init_deepspeed(self) -> None:
        for parameter in self.module.parameters():
            # DeepSpeed supports only this memory layout, not channels-last; images and activations keep theirs.
            parameter.data = parameter.data.contiguous()
        try:
            super().init_deepspeed()
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"deepspeed.config: DeepSpeed rejects {name} ({first['input']!r}) in {error.title}: {first['msg']}."
            ) from None
        if self.module.trainer.training:
            ZeroOptimizer(self.deepspeed_engine)  # Fail now instead of at the first save if a private name is missing.

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        try:
            optimizer, schedule = super().make_optimizer()
        except (MisconfigurationException, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "multiple optimizers" not in str(error):
                raise
            name = type(self.module).__name__
            raise UsageError(
                f"model: {name} has several optimizers or schedules, and ZeRO supports one; use strategy ddp."
            ) from None
        names = parameter_names(self.module)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = [names[id(p)] for p in stepped]
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        # DeepSpeed allocates one bucket or two of the full size, however small the model is.
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], sum(full_shape(p).numel() for p in stepped))
        return optimizer, schedule

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty, as the shards hold the state."""
        return {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """State that the shards omit: buffers, and parameters that are neither partitioned nor stepped."""
        stepped, first = self._stepped(), parameter_names(self.module)
        parameters = self.module.named_parameters(remove_duplicate=False)
        in_shards = {name for name, p in parameters if first[id(p)] in stepped or is_partitioned(p)}
        return {name: value for name, value in self.module.state_dict().items() if name not in in_shards}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.module
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        saved = ShardedState.from_shards(Path(checkpoint_path).parent) or ShardedState()
        saved.include_weights(checkpoint["state_dict"], module)
        loaded = set()
        if module.trainer.state.fn == TrainerFn.FITTING:
            if any(states := checkpoint.get("optimizer_states", ())):  # from DDP; ZeRO saves them in the shards
                saved.include_optimizer(states[0], self._names)
            _restore_shards(ZeroOptimizer(self.deepspeed_engine), module, saved)
            loaded = self._stepped()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name not in loaded:
                    with gathered(parameter, modifier_rank=0):
                        parameter.copy_(saved.full_tensor(name))
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in names}
        return checkpoint

    def _stepped(self) -> set[str]:
        """Names of the parameters that the optimizer steps; it may also have frozen ones."""
        return {name for name, p in self.module.named_parameters() if p.requires_grad} & set(self._names)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.module.load_state_dict(checkpoint["state_dict"], strict=False)


def _capture_shard(zero: ZeroOptimizer, module: nn.Module) -> tuple[list[State], Tensor]:
    """This rank's shard, whose tensors are live or mapped from NVMe, and its places as ``join_places`` needs them."""
    state_keys = _optimizer_keys(zero)
    shard = [
        {WEIGHT: zero.read_flat(index), **{key: zero.read_flat(index, key) for key in state_keys}}
        for index in range(len(zero.flats))
    ]
    numbers = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    places = []
    for part in zero.fragments(module):
        index, offset = part.flat, part.offset
        if index is None:
            index, offset = len(shard), 0
            shard.append({WEIGHT: part.read_unstepped()})
        places.append([numbers[part.name], part.start, part.size, index, offset])
    return shard, torch.tensor(places, dtype=torch.int64).reshape(-1, 5).T.contiguous()


def _capture_index(zero: ZeroOptimizer, module: nn.Module, slices: Mapping[str, State]) -> State:
    """The index of the shards of all ranks."""
    names, flats, inner, keys = parameter_names(module), zero.flats, zero.inner, _optimizer_keys(zero)
    state = inner.state[flats[0]] if flats and flats[0] in inner.state else {}
    return {
        "slices": slices,
        "aliases": {
            alias: names[id(p)] for alias, p in module.named_parameters(remove_duplicate=False) if names[id(p)] != alias
        },
        "keys": keys,
        "scalars": {key: value for key, value in state.items() if key not in keys},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
        **zero.capture_counters(),
    }


def _optimizer_keys(zero: ZeroOptimizer) -> list[str]:
    """Names of the optimizer's tensors that have a value for each element, such as ``exp_avg``; none before the first step."""
    flats = zero.flats
    state = zero.inner.state[flats[0]] if flats and flats[0] in zero.inner.state else {}
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flats[0].shape]


def _restore_shards(zero: ZeroOptimizer, module: nn.Module, saved: ShardedState) -> None:
    """Restore this rank's optimizer state, and the weights that the optimizer steps, from ``saved``."""
    inner, keys = zero.inner, saved.keys
    parts = [part for part in zero.fragments(module) if part.flat is not None]
    # The step of a fused optimizer is on the device.
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for index, flat in enumerate(zero.flats):
        with torch.no_grad(), zero.in_memory(index):
            inner.state[flat] = {key: torch.zeros_like(flat) for key in keys}
            for name, value in saved.scalars.items():
                is_tensor = isinstance(value, Tensor)
                inner.state[flat][name] = (
                    value.to(flat.device if on_device else value.device, copy=True) if is_tensor else value
                )
            for part in parts:
                if part.flat == index:
                    for key in (None, *keys):
                        part.write(key, saved.slice(part.name, key or WEIGHT, part.start, part.size))
    zero.update_model_weights()
    for group, options in zip(inner.param_groups, saved.groups, strict=bool(saved.groups)):
        group.update(options)
    zero.restore_counters(saved.scaler, saved.counters)
