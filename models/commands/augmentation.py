"""Random crops, timm's augmentations, and random numbers that do not depend on what was drawn before."""

import hashlib
import importlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.commands.images import RESAMPLING, Preprocessing


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


def timm_part(module: str, name: str, option: str) -> Any:
    """``timm.module.name``, for ``option``. ImportError where timm is not installed, or does not work here."""
    try:
        return getattr(importlib.import_module(f"timm.{module}"), name)
    except Exception as error:  # a broken installation can fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ImportError(f"{option} needs timm, which cannot be imported here ({reason}); pip install timm") from error


@dataclass(eq=False)
class Augmentation:
    """Random-resized crop (arXiv 1409.4842, section 6), horizontal flip and RandAugment, ``preprocessing.normalise``,
    then random erasing. The two with a name of their own are timm's, and draw from the global generators.

    Args:
        preprocessing: gives size, interpolation, mean and std.
        least_area: the crop takes a share of the image's area drawn from ``least_area``..1.
        flip: probability of mirroring.
        rand_augment: RandAugment (arXiv 1909.13719) in timm's notation; pixels shifted in have the mean's colour.
        erasing: probability that a random part becomes noise (arXiv 1708.04896).

    Raises:
        ImportError: timm cannot be used.
        ValueError: timm does not understand ``rand_augment``.
    """

    preprocessing: Preprocessing
    least_area: float = 0.08
    flip: float = 0.5
    rand_augment: str = ""
    erasing: float = 0.0

    def __post_init__(self) -> None:
        self.change = self.erase = None
        if self.rand_augment:
            make = timm_part("data.auto_augment", "rand_augment_transform", "--rand-augment")
            colour = tuple(min(255, round(255 * share)) for share in self.preprocessing.mean)
            reach = int(min(self.preprocessing.size) * 0.45)
            try:
                self.change = make(self.rand_augment, {"translate_const": reach, "img_mean": colour})
            except Exception as error:  # timm asserts, or fails deeper inside
                what = "must be written like rand-m9-mstd0.5-inc1"
                raise ValueError(f"--rand-augment {what}, got {self.rand_augment!r}") from error
        if self.erasing:
            erase = timm_part("data.random_erasing", "RandomErasing", "--erasing")
            self.erase = erase(self.erasing, mode="pixel", device="cpu")

    def box(self, width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the crop: aspect ratio log-uniform in 3/4..4/3."""
        for _ in range(10):
            area = width * height * generator.uniform(self.least_area, 1)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = generator.randint(0, width - w), generator.randint(0, height - h)
                return left, top, left + w, top + h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # a long strip: take its middle
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __call__(self, image: Image.Image, generator: random.Random) -> Tensor:
        height, width = self.preprocessing.size
        box = self.box(image.width, image.height, generator)
        image = image.resize((width, height), RESAMPLING[self.preprocessing.interpolation], box=box)
        if generator.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.change is None and self.erase is None:
            return self.preprocessing.normalise(image)
        with seeded(generator.getrandbits(56)):
            x = self.preprocessing.normalise(image if self.change is None else self.change(image))
            return x if self.erase is None else self.erase(x)
