"""Train loaders and a curriculum for runs that are disturbed. A job imports a copy of this file from its own folder."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lockstep.data import Digits
from lockstep.models import Classifier


class TwoLoaders(Digits):
    """The digits, and a shorter loader of some of them, which starts again within an epoch."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        some = Subset(loader.dataset, range(480))
        shorter = DataLoader(some, batch_size=self.global_batch_size, shuffle=True, collate_fn=self.collate)
        return {"all": loader, "some": shorter}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict):
            return {name: super(TwoLoaders, self).on_after_batch_transfer(each, dataloader_idx) for name, each in batch.items()}
        return super().on_after_batch_transfer(batch, dataloader_idx)


class MeanOfLosses(Classifier):
    """The classifier, with the mean of the losses of several loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [super(MeanOfLosses, self).training_step(each, batch_idx) for each in batch.values()]
        return torch.stack(losses).mean()


class Curriculum(Callback):
    """Adds more noise to the images with each epoch, through the Trainer's DataLoader."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        dataset = loader.dataset
        dataset.transform = partial(_add_noise, level=10 * trainer.current_epoch)
        dataset.deterministic = False


def _add_noise(image: Tensor, level: int) -> Tensor:
    return (image + torch.randint(0, level + 1, image.shape)).clamp(max=255).to(torch.uint8)
