"""How to train, and which images each step sees: all that a run's result follows from, beside the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, Sampler

from models.commands import distributed
from models.commands.randomness import seed_of
from models.commands.types import DTYPES, FRACTION, Number, positive

__all__ = ["OPTIONS", "Recipe", "TrainingBatches"]

ANY = Number(at_least=0)
BELOW_ONE = Number(at_least=0, below=1)


def _option(default: Any, flag: str, kind: Any, text: str) -> Any:
    """A field that the command line sets by ``flag``; ``kind`` is a Number, the values it may have, bool or str."""
    return field(default=default, metadata={"flag": flag, "kind": kind, "help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train. Everything here decides the result, nothing else does.

    Each field's metadata holds its option on the command line, the values that it may have, and what it means.
    """

    epochs: int = _option(10, "--epochs", positive, "passes over the training images")
    batch: int = _option(64, "--batch", positive, "images at a time, in each process")
    accumulate: int = _option(1, "--accumulate", positive, "batches per step, whose gradients are averaged")
    optimizer: str = _option("adamw", "--optimizer", ("adamw", "sgd"), "sgd: with Nesterov's momentum of 0.9")
    learning_rate: float = _option(1e-4, "--lr", Number(above=0), "peak, reached after the warm-up")
    final_learning_rate: float = _option(1e-6, "--min-lr", ANY, "learning rate of the last step")
    warmup_epochs: float | None = _option(None, "--warmup-epochs", ANY, "linear warm-up; a tenth of the epochs")
    first_learning_rate: float | None = _option(None, "--warmup-lr", ANY, "where the warm-up begins; a step above 0")
    weight_decay: float = _option(0.05, "--weight-decay", ANY, "for matrices and kernels")
    decay_vectors: bool = _option(False, "--decay-vectors", bool, "biases and scales decay too")
    layer_decay: float = _option(
        1.0,
        "--layer-decay",
        Number(above=0, at_most=1),
        "factor of the learning rate per layer, from the last to the first",
    )
    label_smoothing: float = _option(0.1, "--label-smoothing", BELOW_ONE, "share of the label that all classes get")
    auxiliary_weight: float = _option(0.4, "--aux-weight", ANY, "of OverLoCK's auxiliary loss")
    clip_norm: float = _option(5.0, "--clip", ANY, "largest norm of the gradient, 0: any")
    ema_decay: float = _option(0.999, "--ema", BELOW_ONE, "decay of the averaged weights, 0: none")
    least_area: float = _option(0.08, "--least-area", Number(above=0, at_most=1), "smallest crop, as a share")
    flip: float = _option(0.5, "--flip", FRACTION, "chance of mirroring")
    mixup: float = _option(0.0, "--mixup", ANY, "alpha of mixup; by timm, as what follows")
    cutmix: float = _option(0.0, "--cutmix", ANY, "alpha of CutMix; with both, each half of the time")
    rand_augment: str = _option("", "--rand-augment", str, "RandAugment, as in rand-m9-mstd0.5-inc1")
    erasing: float = _option(0.0, "--erasing", FRACTION, "chance of erasing a random part")
    repeats: int = _option(1, "--repeats", positive, "repeated augmentation: times that an epoch sees an image")
    dtype: str = _option("fp32", "--dtype", tuple(DTYPES), "bf16 and fp16 by autocast, fp16 with scaled gradients")
    seed: int = _option(0, "--seed", Number(at_least=0, at_most=2**62, whole=True), "of everything random")
    freeze_backbone: bool = _option(False, "--freeze-backbone", bool, "train nothing but the classifier")

    def __post_init__(self) -> None:
        """Raises ValueError, whose message begins with the field's name."""
        for known in fields(self):
            kind, value = known.metadata["kind"], getattr(self, known.name)
            if isinstance(kind, tuple) and value not in kind:
                raise ValueError(f"{known.name} must be one of {', '.join(kind)}, got {value!r}")
            if isinstance(kind, Number) and not (value is None and known.default is None) and not kind.holds(value):
                raise ValueError(f"{known.name} must be {kind}, got {value}")
        for name in ("first_learning_rate", "final_learning_rate"):
            if (getattr(self, name) or 0) > self.learning_rate:
                raise ValueError(f"{name} must be at most the peak of {self.learning_rate}, got {getattr(self, name)}")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup_epochs must be below the {self.epochs} epochs, got {self.warmup_epochs}")
        if self.batch % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"batch must be even to be mixed, got {self.batch}")

    @property
    def warmup(self) -> float:
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs


OPTIONS = {known.name: known.metadata["flag"] for known in fields(Recipe)}  # field -> option of the command line


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The keys (draw, index) of every batch of a run from one step on, for the process of this rank.

    Each epoch is a new permutation; its images that fill no whole step are left out. The draw, epoch · repeats + copy,
    numbers what an image was augmented to: with ``repeats`` an epoch sees fewer images, each of them so many times.

    Raises:
        ValueError: there are fewer images than a step takes.
        ImportError: repeated augmentation needs timm.
    """

    def __init__(self, dataset: Dataset[Any], recipe: Recipe, first_step: int = 0) -> None:
        self.recipe, self.first_step = recipe, first_step
        self._ranks, self._rank = distributed.world_size(), distributed.rank()
        length = len(dataset)  # pyright: ignore[reportArgumentType]
        a_step = recipe.batch * recipe.accumulate * self._ranks
        self.steps_per_epoch = length // a_step
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"a step takes {a_step} images (--batch × --accumulate × processes), there are only {length}"
            )
        if recipe.repeats == 1:
            self._sampler: Any = DistributedSampler(dataset, self._ranks, self._rank, seed=recipe.seed, drop_last=True)
        else:
            from models.commands.augmentation import timm_part

            sampler = timm_part("distributed_sampler", "RepeatAugSampler", "--repeats")
            self._sampler = sampler(dataset, self._ranks, self._rank, num_repeats=recipe.repeats, selected_round=0)

    def __len__(self) -> int:
        return (self.recipe.epochs * self.steps_per_epoch - self.first_step) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, start = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.recipe.epochs):
            keys = list(itertools.islice(self._keys(epoch), self.steps_per_epoch * self._images))
            for first in range(start * self._images, len(keys), self.recipe.batch):
                yield keys[first : first + self.recipe.batch]
            start = 0

    @property
    def _images(self) -> int:
        """Of a step, in this process."""
        return self.recipe.batch * self.recipe.accumulate

    def _keys(self, epoch: int) -> Iterator[tuple[int, int]]:
        repeats = self.recipe.repeats
        # timm's sampler knows no seed but the epoch.
        self._sampler.set_epoch(epoch if repeats == 1 else seed_of(self.recipe.seed, epoch))
        for position, index in enumerate(self._sampler):
            copy = (self._rank + position * self._ranks) % repeats  # an image's copies are dealt out in turn
            yield epoch * repeats + copy, index
