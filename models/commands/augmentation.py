"""timm's augmentations, which need timm to be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor


def timm_part(module: str, name: str, option: str) -> Any:
    """``timm.data.module.name``, for ``option``. ImportError where timm is not installed, or does not work here."""
    try:
        return getattr(importlib.import_module(f"timm.data.{module}"), name)
    except Exception as error:  # a broken installation can fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ImportError(f"{option} needs timm, which cannot be imported here ({reason}); pip install timm") from error


def rand_augment(config: str, size: Sequence[int], mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """RandAugment (arXiv 1909.13719), with ``config`` in timm's notation; pixels shifted in have the colour ``mean``.

    Raises:
        ImportError: timm cannot be used.
        ValueError: timm does not understand ``config``.
    """
    make = timm_part("auto_augment", "rand_augment_transform", "--rand-augment")
    colour = tuple(min(255, round(255 * share)) for share in mean)
    try:
        return make(config, {"translate_const": int(min(size) * 0.45), "img_mean": colour})
    except Exception as error:  # timm asserts, or fails deeper inside
        raise ValueError(f"--rand-augment must be written like rand-m9-mstd0.5-inc1, got {config!r}") from error


def random_erasing(probability: float) -> Callable[[Tensor], Tensor]:
    """A random part of a normalised image becomes noise (arXiv 1708.04896). ImportError where timm cannot be used."""
    return timm_part("random_erasing", "RandomErasing", "--erasing")(probability, mode="pixel", device="cpu")


def mixing(mixup: float, cutmix: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels [B]) -> images mixed with each other, labels [B, num_classes]: mixup (arXiv 1710.09412), CutMix
    (arXiv 1905.04899), or one of them per batch, as their alphas are above 0. ImportError where timm cannot be used.
    """
    mix = timm_part("mixup", "Mixup", "--mixup or --cutmix")
    return mix(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=num_classes)
