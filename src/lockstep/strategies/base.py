"""What every strategy does with data: its order, where a resumed run begins, and the weight of an uneven last batch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lockstep.checkpoint import ShardedState, State, parameter_names
from lockstep.data import DataPosition, DataSharding, GlobalBatchSampler, SkipFirstBatches, derive_seed


class LockstepStrategy(Strategy):
    """What every lockstep strategy does with data: each loader goes in the run's order, and an uneven last batch counts
    each of its samples alike."""

    sharding: DataSharding
    position: DataPosition | None = None
    gradient_ready_order: list[int] | None = None
    saved: ShardedState | None = None

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # All ranks have drawn the same weights; from here on each draws its own dropout. Not earlier: setting up the process
        # group, lightning seeds every rank alike.
        torch.manual_seed(derive_seed(self.sharding.seed, self.sharding.world.rank) >> 1)

    def shards(self) -> State | None:
        """What this rank has of weights and optimizer where they are shared out; None where rank zero has all."""
        return None

    def global_grad_norm(self) -> Tensor | float | None:
        """The gradient's 2-norm before clipping at the newest step, where the strategy alone knows it."""
        return None

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The module's ``state_dict``, one by one in the order of the names; every rank must go through all of it."""
        assert self.lightning_module is not None
        yield from sorted(self.lightning_module.state_dict().items())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        self.saved = ShardedState.of(Path(checkpoint_path).parent)
        if self.saved is not None:  # written by ZeRO
            assert self.lightning_module is not None
            parameters = dict(self.lightning_module.named_parameters())
            self.saved.include({name: value for name, value in checkpoint["state_dict"].items() if name in parameters})
            self.saved.check_same_model({name: p.shape for name, p in parameters.items()})
            checkpoint["state_dict"] |= self.saved.weights()
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.saved is not None:
            assert self.lightning_module is not None
            state = self.saved.optimizer_state(self.optimizers[0], parameter_names(self.lightning_module))
            checkpoint = {**checkpoint, "optimizer_states": [state]}
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            for parameter, kept in optimizer.state.items():
                for key, value in kept.items():
                    # A fused step goes through memory as it lies: what is kept must lie as its parameter does.
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                        kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        owner = type(getattr(trainer, "datamodule", None) or self.lightning_module).__name__
        ordered = self.sharding.shard(dataloader, owner, whole=trainer is not None and trainer.predicting)
        position = self.position
        if not (isinstance(ordered, DataLoader) and isinstance(ordered.batch_sampler, GlobalBatchSampler)):
            return SkipFirstBatches(ordered, position.batch) if position else ordered
        # Now: lightning tells the epoch only after workers have begun to fetch.
        if position:
            ordered.batch_sampler.epoch_sampler.set_epoch(position.epoch)
            ordered.batch_sampler.start = position
        elif trainer is not None:
            ordered.batch_sampler.epoch_sampler.set_epoch(trainer.current_epoch)
        return ordered

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        weight = self._batch_weight()
        return super().backward(closure_loss if weight == 1 else closure_loss * weight, optimizer, *args, **kwargs)

    def _batch_weight(self) -> float:
        module = self.lightning_module
        if module is None or self.sharding.world.size == 1:
            return 1.0
        loader = module.trainer.train_dataloader
        batches = getattr(loader, "batch_sampler", None)
        return batches.rank_weight(module.trainer.fit_loop.batch_idx) if isinstance(batches, GlobalBatchSampler) else 1.0
