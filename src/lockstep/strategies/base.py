"""The base of all strategies: sharding of the data, the weight of an uneven last batch, and the point to resume from."""

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.optim import Optimizer

from lockstep.compat.lightning import current_hook, set_sampler_epoch
from lockstep.data.loading import DataPosition, DataSharding, current_batch, derive_seed
from lockstep.distributed import broadcast
from lockstep.strategies.sharded_state import ShardedState, State, parameter_names
from lockstep.strategies.stand_in import undo_step, without_weight

log = logging.getLogger(__name__)

T = TypeVar("T")

_STEPS = ("training_step", "validation_step", "test_step")


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups, in the order in which a ``state_dict`` numbers them."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def keep_state_dtypes(optimizer: Optimizer, loaded: Mapping[str, Any]) -> None:
    """Undo what ``load_state_dict(loaded)`` has done: a cast of states to the dtype of their parameters.

    An example is the float32 momentum of bfloat16 weights. Optimizers that wrap others may have a ``state_dict`` of their own.
    """
    if not {"param_groups", "state"} <= loaded.keys():
        return
    numbers = [number for group in loaded["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, optimizer_parameters(optimizer), strict=True):
        state = optimizer.state.get(parameter, {})
        for key, value in loaded["state"].get(number, {}).items():
            if isinstance(value, Tensor) and isinstance(state.get(key), Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device, copy=True)


@dataclass(frozen=True)
class ResumePoint:
    """What one rank needs to resume, in addition to Lightning's checkpoint.

    Attributes:
        epoch: Number of the epoch, from 0.
        positions: Position in each loader of training.
        loaded_epochs: Epochs in which the loaders of training and of validation were requested; None: not requested yet.
        validation_due: With ``val_check_interval`` as a time: whether a validation comes next.
        seconds_since_validation: Seconds of training since the last validation.
        states: This rank's saved state; in a world of another size, those of the ranks that it replaces, or none.
        shared: The state of one rank, for values that are equal on all ranks.
        seed: Seed of a rank that does not have exactly one state.
        gradient_ready_order: Names of the parameters in the order in which DDP reduces their gradients; None without DDP.
        should_stop: Whether ``Trainer.should_stop`` was set on any rank.
        has_ended: Whether training and all of its hooks had ended.
    """

    epoch: int
    positions: Sequence[DataPosition]
    loaded_epochs: Sequence[int | None]
    validation_due: bool
    seconds_since_validation: float
    states: Sequence[State]
    shared: State
    seed: int
    gradient_ready_order: list[str] | None
    should_stop: bool
    has_ended: bool


class LockstepStrategy(Strategy):
    """Base of all strategies: shards every DataLoader, and gives each sample of an uneven last batch the same weight."""

    sharding: DataSharding
    _resume_point: ResumePoint | None = None
    _known: set[int]
    _frozen: dict[str, nn.Parameter]
    _modules: Set[int] = frozenset()
    _checked_epoch = -1  # also after a module has got a parameter
    _handles: Sequence[Any] = ()
    _sharded_state: ShardedState | None = None

    def broadcast(self, obj: T, src: int = 0) -> T:
        """As Lightning's, for tensors, numbers, strings and collections: no code that another rank sends is executed."""
        return broadcast(obj, src) if torch.distributed.is_initialized() else obj

    @property
    def module(self) -> LightningModule:
        """The module that the Trainer trains."""
        assert self.lightning_module is not None
        return self.lightning_module

    def resume_from(self, point: ResumePoint) -> None:
        """Start the fit at ``point``."""
        self._resume_point = point

    @property
    def gradient_ready_order(self) -> list[str] | None:
        """Names of the parameters in the order in which gradients are reduced; None if it is not sorted during training."""
        return None

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self._note_parameters()
        if trainer.state.fn == "fit":
            registers = (register_module_parameter_registration_hook, register_module_module_registration_hook)
            self._handles = [register(self._on_registration) for register in registers]
        # All ranks have drawn the same weights; from now on each draws its own dropout. Not earlier: Lightning gives all
        # ranks the same seed when it sets up the process group.
        torch.manual_seed(derive_seed(self.sharding.seed, self.sharding.world.rank) >> 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.prepare_step()
        if not self._is_stand_in:
            return super().training_step(*args, **kwargs)
        with undo_step(self.module):
            return without_weight(super().training_step(*args, **kwargs))

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with undo_step(self.module) if self._is_stand_in else nullcontext():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with undo_step(self.module) if self._is_stand_in else nullcontext():
            return super().test_step(*args, **kwargs)

    @property
    def _is_stand_in(self) -> bool:
        """Whether all samples of this rank's batch were skipped."""
        return getattr(getattr(self.module.trainer, "datamodule", None), "rank_weight", None) == 0

    def prepare_step(self) -> None:
        """Called on all ranks before each ``training_step`` of the module."""
        epoch = self.module.current_epoch
        if epoch != self._checked_epoch:  # walking all modules at each step takes too long
            new = self._new_parameters()
            if new and not is_overridden("on_load_checkpoint", self.module):
                text = "parameter %s is new; a restart can restore it only if on_load_checkpoint of the module creates it"
                log.warning(text, next(iter(new)))
            self._frozen |= new
            self._known |= {id(parameter) for parameter in new.values()}
            self._modules = {id(module) for module in self.module.modules()}
            self._checked_epoch = epoch
        if newly := [name for name, parameter in self._frozen.items() if parameter.requires_grad]:
            self.on_unfrozen(newly)
            self._note_parameters()

    def on_unfrozen(self, names: Sequence[str]) -> None:
        """Called on all ranks before a step in which the parameters ``names`` begin to require a gradient."""

    def teardown(self) -> None:
        for handle in self._handles:
            handle.remove()
        super().teardown()

    def _on_registration(self, module: nn.Module, name: str, part: object) -> None:
        """Called when any module gets a parameter or a submodule."""
        if id(module) in self._modules:
            self._checked_epoch = -1

    def _new_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if id(p) not in self._known}

    def _note_parameters(self) -> None:
        parameters = dict(self.module.named_parameters())
        self._known = {id(parameter) for parameter in parameters.values()}
        self._frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank saves its own shard of weights and optimizer state, which Lightning's checkpoint lacks."""
        return False

    @property
    def is_on_disk(self) -> bool:
        """Whether weights or optimizer state are on a disk, and may not fit into memory."""
        return False

    def shards(self) -> State:
        """Files of a checkpoint, by name, with this rank's shard of weights and optimizer state; every rank must call."""
        return {}

    def global_grad_norm(self) -> Tensor | float | None:
        """The gradient's 2-norm before clipping in the newest step; None if the strategy does not compute it."""
        return None

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters of which every rank has an equal, full copy."""
        yield from self.module.named_parameters()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Entries of the module's ``state_dict``, sorted by name; every rank must iterate over all of them."""
        yield from sorted(self.module.state_dict().items())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        self._sharded_state = saved = ShardedState.from_shards(Path(checkpoint_path).parent)
        if saved is not None:  # ZeRO has saved it
            saved.include_weights(checkpoint["state_dict"], self.module)
            checkpoint["state_dict"] |= saved.full_weights()
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        # Lightning converts the module after the weights are loaded: 64-true would round them to float32.
        self.precision_plugin.convert_module(self.module)
        weights = _without_masks(checkpoint["state_dict"], self.module, is_pruned_again=self._resume_point is not None)
        super().load_model_state_dict({**checkpoint, "state_dict": weights}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._sharded_state is not None:
            state = self._sharded_state.optimizer_state(self.optimizers[0], parameter_names(self.module))
            checkpoint = {**checkpoint, "optimizer_states": [state]}
        super().load_optimizer_state_dict(checkpoint)
        dtypes = {value.dtype for value in checkpoint.get("state_dict", {}).values() if isinstance(value, Tensor)}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if {parameter.dtype for parameter in optimizer_parameters(optimizer)} <= dtypes:  # or the precision is another one
                keep_state_dtypes(optimizer, saved)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    # A fused step ignores strides, so the state must have the memory layout of its parameter.
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                        state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self.module.trainer
        loader = self.sharding.shard(
            dataloader,
            type(getattr(trainer, "datamodule", None) or self.module).__name__,
            is_training=trainer.training,
            keeps_last=trainer.predicting,
            epoch=lambda: trainer.current_epoch,
        )
        # Set the epoch of the user's sampler now: Lightning does so only after the workers have begun to fetch.
        set_sampler_epoch(loader, trainer.current_epoch)
        return loader

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if (weight := self._rank_weight()) != 1:
            closure_loss = closure_loss * weight if weight else without_weight(closure_loss)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if reduce_op == "mean" and isinstance(tensor, Tensor) and self.sharding.world.size > 1:
            if not tensor.is_floating_point():  # Lightning divides the mean of an epoch by the mean of the ranks' samples
                tensor = tensor.float()
            # A step logs means over its samples.
            if current_hook(self.module) in _STEPS and (weight := self._rank_weight()) != 1:
                tensor = tensor * weight if weight else torch.zeros_like(tensor)
        return super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]

    def _rank_weight(self) -> float:
        """The factor that makes a mean over ranks the mean over the samples of this step."""
        trainer = self.module.trainer
        weight = getattr(getattr(trainer, "datamodule", None), "rank_weight", None)
        if weight is None and trainer.training:
            batch = current_batch(trainer)
            assert batch is not None
            weight = batch.weight
        return 1.0 if weight is None else float(weight)


def _without_masks(state_dict: Mapping[str, Tensor], module: nn.Module, is_pruned_again: bool) -> dict[str, Tensor]:
    """``state_dict`` for a ``module`` that is not pruned yet, if ``torch.nn.utils.prune`` has split weights into orig and mask.

    A resumed run is pruned after its optimizers have their parameters, so it needs the original weights.
    """
    weights, own = dict(state_dict), module.state_dict().keys()
    for name in [name.removesuffix("_mask") for name in weights if name.endswith("_mask")]:
        if f"{name}_orig" in weights and name in own:
            original, mask = weights.pop(f"{name}_orig"), weights.pop(f"{name}_mask")
            weights[name] = original if is_pruned_again else original * mask
    return weights
