"""Labelled images in the ImageFolder layout: one folder per class, classes numbered in the order of their names."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.commands.images import Augmentation, UnreadableImageError, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Item = tuple[Tensor, int] | str  # an image and its label; or why a file cannot be decoded, as workers cannot raise it


class ImageFolder:
    """The images below a folder's class folders, in a fixed order.

    ImageNet's validation folder sorted by synset (n01440764, …) gives the published class numbers.

    Attributes:
        root: the folder.
        classes: names of the class folders, sorted; the label is the position.
        samples: (path, label) of every image, by class and then by path.

    Raises:
        ValueError: no such folder, no class folders, or one without images; the message names it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"DIR: there is no folder {self.root}")
        seen = {os.path.realpath(self.root)}
        self.classes = sorted(
            entry.name
            for entry in os.scandir(self.root)
            if entry.is_dir() and not entry.name.startswith(".") and os.path.realpath(entry.path) not in seen
        )
        if not self.classes:
            raise ValueError(f"DIR: {self.root} must hold one folder of images for each class, it holds no folder")
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            if len(name.splitlines()) > 1:  # names are kept one per line
                raise ValueError(f"DIR: the class folder {name!r} has a line break in its name")
            found = sorted(_images_below(os.path.join(self.root, name), set(seen)))
            if not found:
                raise ValueError(f"DIR: the class folder {self.root / name} holds no image ({' '.join(SUFFIXES)})")
            self.samples += [(path, label) for path in found]

    def digest(self) -> str:
        """Changes with the set of files, not with where the folder lies."""
        digest = hashlib.sha256()
        for path, _ in self.samples:
            digest.update(os.fsencode(os.path.relpath(path, self.root)) + b"\0")
        return digest.hexdigest()[:16]


def _images_below(folder: str, seen: set[str]) -> Iterator[str]:
    """Of every folder once, whichever links lead to it, and of none that was ``seen`` before."""
    seen.add(os.path.realpath(folder))
    for path, folders, files in os.walk(folder, followlinks=True):
        real = {os.path.realpath(os.path.join(path, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for target, name in real.items() if target not in seen)
        seen |= real.keys()
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(path, name)


class EvaluationImages(Dataset[Item]):
    """Index -> (image, label), the same each time."""

    def __init__(
        self, samples: Sequence[tuple[str, int]], transform: Callable[[Image.Image], Tensor], channels: int = 3
    ) -> None:
        self.samples, self.transform, self.channels = samples, transform, channels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        path, label = self.samples[index]
        try:
            return self.transform(read_image(path, self.channels)), label
        except UnreadableImageError as error:
            return str(error)


class TrainingImages(Dataset[Item]):
    """(draw, index) -> (augmented image, label); the draw is the epoch, or one of several in an epoch.

    What is drawn depends on seed, draw and index alone: not on the process that draws, nor on what came before. So a
    run that continues after a kill sees what it would have seen.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], augmentation: Augmentation, seed: int) -> None:
        self.samples, self.augmentation, self.seed = samples, augmentation, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        draw, index = key
        generator = random.Random(f"{self.seed} {draw} {index}")
        channels = self.augmentation.preprocessing.channels
        return EvaluationImages(self.samples, lambda image: self.augmentation(image, generator), channels)[index]


class Batch(NamedTuple):
    """images [B, C, H, W] and labels [B] of what could be read, and a message for each file that could not."""

    images: Tensor
    labels: Tensor
    unreadable: list[str]


def collate(items: Sequence[Item]) -> Batch:
    read = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0, 0, 0, 0)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    return Batch(images, labels, [item for item in items if isinstance(item, str)])


def loader(dataset: Dataset[Any], device: torch.device, workers: int, **options: Any) -> DataLoader[Any]:
    """Batches as ``collate`` makes them, loaded by ``workers`` processes (0: by this one)."""
    return DataLoader(dataset, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda", **options)
