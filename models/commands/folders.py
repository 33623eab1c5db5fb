"""Labelled images in the ImageFolder layout: one folder per class, classes numbered in the order of their names."""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from models.commands import distributed
from models.commands.augmentation import Augmentation, seed_of, timm_part
from models.commands.images import Preprocessing, UnreadableImageError, read_image
from models.commands.recipe import Recipe

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # parts of a data set, which nobody sorts into
UNREADABLE = -1


class ImageFolder:
    """The images below a folder's class folders, in a fixed order.

    ImageNet's validation folder sorted by synset (n01440764, …) gives the published class numbers.

    Attributes:
        root: the folder.
        classes: names of the class folders, sorted; the label is the position.
        samples: (path, label) of every image, by class and then by path.

    Raises:
        ValueError: no such folder, no class folders, one without images, or parts such as val instead; it is named.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"DIR: there is no folder {self.root}")
        root = os.path.realpath(self.root)  # a link may lead back to it
        self.classes = sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir() and not entry.name.startswith(".") and os.path.realpath(entry.path) != root
        )
        if not self.classes:
            raise ValueError(f"DIR: {self.root} must hold one folder of images for each class, it holds no folder")
        if SPLITS.issuperset(self.classes):
            parts = " or ".join(str(self.root / name) for name in self.classes)
            raise ValueError(f"DIR: {self.root} must hold one folder for each class; did you mean {parts}?")
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            if len(name.splitlines()) > 1:  # classes.txt has one name per line
                raise ValueError(f"DIR: the class folder {name!r} has a line break in its name")
            found = sorted(_images_below(os.path.join(self.root, name), {root}))
            if not found:
                raise ValueError(f"DIR: the class folder {self.root / name} holds no image ({' '.join(SUFFIXES)})")
            self.samples += [(path, label) for path in found]

    def digest(self) -> str:
        """A hash of the files' names relative to the folder."""
        digest = hashlib.sha256()
        for path, _ in self.samples:
            digest.update(os.fsencode(os.path.relpath(path, self.root)) + b"\0")
        return digest.hexdigest()[:16]


def _images_below(folder: str, seen: set[str]) -> Iterator[str]:
    """Paths of images; each folder is read once, whichever links lead to it, unless it is in ``seen``."""
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(path, name)


class EvaluationImages(Dataset[tuple[Tensor, int]]):
    """Index -> (image, label), the same each time; with ``skip`` the label of an unreadable file is ``UNREADABLE``."""

    def __init__(self, samples: Sequence[tuple[str, int]], preprocessing: Preprocessing, skip: bool = False) -> None:
        self.samples, self.preprocessing, self.skip = samples, preprocessing, skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            return self.preprocessing(read_image(path, self.preprocessing.channels)), label
        except UnreadableImageError:
            if not self.skip:
                raise
            return torch.zeros(self.preprocessing.channels, *self.preprocessing.size), UNREADABLE


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """(draw, index) -> (augmented image, label); the draw is the epoch, or one of several in an epoch.

    The augmentation depends on seed, draw and index alone: neither on the process that draws it nor on what was drawn
    before. So a run that continues after a kill sees what it would have seen.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], augmentation: Augmentation, seed: int) -> None:
        self.samples, self.augmentation, self.seed = samples, augmentation, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        draw, index = key
        path, label = self.samples[index]
        generator = random.Random(f"{self.seed} {draw} {index}")
        return self.augmentation(read_image(path, self.augmentation.preprocessing.channels), generator), label


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The keys (draw, index) of every batch of a run from one step on, for the process of this rank.

    Each epoch is a new permutation; its images that fill no whole step are left out. With ``repeats`` an epoch sees
    fewer images, each of them so many times, in different processes where there are some; a draw is epoch · repeats +
    copy.

    Raises:
        ValueError: there are fewer images than a step takes.
        ImportError: repeated augmentation needs timm.
    """

    def __init__(self, dataset: Dataset[Any], recipe: Recipe, first_step: int = 0) -> None:
        self.recipe, self.first_step = recipe, first_step
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        length = len(dataset)  # pyright: ignore[reportArgumentType]
        self.images = recipe.batch * recipe.accumulate  # per step, in this process
        self.steps_per_epoch = length // (self.images * self.ranks)
        if self.steps_per_epoch == 0:
            per_step = f"{self.images * self.ranks} images (--batch × --accumulate × processes)"
            raise ValueError(f"a step takes {per_step}, there are only {length}")
        if recipe.repeats > 1:
            repeated = timm_part("data.distributed_sampler", "RepeatAugSampler", "--repeats")
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


def loader(dataset: Dataset[Any], device: torch.device, workers: int, **options: Any) -> DataLoader[Any]:
    """Batches, loaded by ``workers`` processes (0: by this one)."""
    return DataLoader(dataset, num_workers=workers, pin_memory=device.type == "cuda", **options)
