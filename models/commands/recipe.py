"""How to train, and which images each step sees: all that a run's result follows from, beside the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, Sampler

from models.commands import distributed
from models.commands.types import DTYPES

__all__ = ["Recipe", "TrainingBatches"]


@dataclass(frozen=True)
class Recipe:
    """How to train. Everything here decides the result, nothing else does.

    Args:
        epochs: passes over the training images.
        batch: images a step and process.
        learning_rate: the peak, reached after the warm-up.
        final_learning_rate: in the last step.
        warmup_epochs: linear warm-up; None a tenth of the epochs.
        weight_decay: of AdamW, for matrices and kernels.
        layer_decay: the learning rate falls by this factor from each layer to the one before it.
        label_smoothing: share of the label spread over all classes.
        auxiliary_weight: of OverLoCK's second classifier in the loss.
        clip_norm: largest norm of the gradient; 0 any.
        ema_decay: of the averaged weights that are evaluated and kept; 0 none.
        dtype: "fp32", or "bf16" or "fp16" by autocast, fp16 with scaled gradients.
        seed: of everything random.
        freeze_backbone: train classifiers only; the network stays in evaluation mode.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    label_smoothing: float = 0.1
    auxiliary_weight: float = 0.4
    clip_norm: float = 5.0
    ema_decay: float = 0.999
    dtype: str = "fp32"
    seed: int = 0
    freeze_backbone: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the field."""
        bounds = {  # field -> condition, in words
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch": (self.batch >= 1, "at least 1"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "final_learning_rate": (0 <= self.final_learning_rate <= self.learning_rate, "in 0..learning_rate"),
            "warmup_epochs": (0 <= self.warmup < self.epochs, "at least 0 and below epochs"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "auxiliary_weight": (self.auxiliary_weight >= 0, "at least 0"),
            "clip_norm": (self.clip_norm >= 0, "at least 0"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (holds, words) in bounds.items():
            if not holds:
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)}")

    @property
    def warmup(self) -> float:
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The keys (epoch, index) of every batch of a run from one step on, for the process of this rank.

    Each epoch is a new permutation; its images that fill no whole step are left out.

    Raises:
        ValueError: there are fewer images than a step takes.
    """

    def __init__(self, dataset: Dataset[Any], recipe: Recipe, first_step: int = 0) -> None:
        self.recipe, self.first_step = recipe, first_step
        length, a_step = len(dataset), recipe.batch * distributed.world_size()  # pyright: ignore[reportArgumentType]
        self.steps_per_epoch = length // a_step
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch: a step takes {a_step} images, there are only {length} to train on")
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, distributed.world_size(), distributed.rank(), seed=recipe.seed, drop_last=True
        )

    def __len__(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, start = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.recipe.epochs):
            self._sampler.set_epoch(epoch)
            order = list(self._sampler)
            for step in range(start, self.steps_per_epoch):
                chosen = order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
                yield [(epoch, index) for index in chosen]
            start = 0
