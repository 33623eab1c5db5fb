"""Which images each step sees, and random numbers that do not depend on what was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler

from models.commands import distributed
from models.commands.augmentation import timm_part
from models.commands.recipe import Recipe


def seed_of(*numbers: int) -> int:
    """56 bits that depend on each of the numbers."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's own generators (on the CPU) from ``seed`` on, and afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (timm draws from it)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


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
        self.ranks, self.rank = distributed.world_size(), distributed.rank()
        length = len(dataset)  # pyright: ignore[reportArgumentType]
        self.images = recipe.batch * recipe.accumulate  # per step, in this process
        self.steps_per_epoch = length // (self.images * self.ranks)
        if self.steps_per_epoch == 0:
            per_step = f"{self.images * self.ranks} images (--batch × --accumulate × processes)"
            raise ValueError(f"a step takes {per_step}, there are only {length}")
        if recipe.repeats > 1:
            repeated = timm_part("distributed_sampler", "RepeatAugSampler", "--repeats")
            self.sampler = repeated(dataset, self.ranks, self.rank, num_repeats=recipe.repeats, selected_round=0)
        else:
            self.sampler = DistributedSampler(dataset, self.ranks, self.rank, seed=recipe.seed, drop_last=True)

    def __len__(self) -> int:
        return (self.recipe.epochs * self.steps_per_epoch - self.first_step) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, start = divmod(self.first_step, self.steps_per_epoch)
        repeats = self.recipe.repeats
        for epoch in range(first_epoch, self.recipe.epochs):
            # timm's sampler is seeded by the epoch alone, and gives the copies of an image to the ranks in turn.
            self.sampler.set_epoch(epoch if repeats == 1 else seed_of(self.recipe.seed, epoch))
            keys = [
                (epoch * repeats + (self.rank + position * self.ranks) % repeats, index)
                for position, index in enumerate(self.sampler)
            ][: self.steps_per_epoch * self.images]
            for first in range(start * self.images, len(keys), self.recipe.batch):
                yield keys[first : first + self.recipe.batch]
            start = 0
