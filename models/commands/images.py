"""From photographs to a model's input: the crop that the papers test with, and the random crop of training."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from models._contract import BackboneContract
from models.commands.dispatch import CommandError
from models.metadata import InputFormat

MODES = {1: "L", 3: "RGB"}  # PIL's mode for so many channels
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # Pillow would hand PostScript to another program
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
LONGEST = 8  # a strip is cut to this many times the ratio of the crop's sides before it is resized


class UnreadableImageError(CommandError, ValueError):
    """A file that cannot be read as an image; the message names it."""

    def __str__(self) -> str:  # a DataLoader puts the traceback of its worker in front of the message
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """The whole image, decoded and upright, in 1 (grey) or 3 (RGB) channels of 8 bits; 16 bits are scaled to them.

    Raises:
        UnreadableImageError: the file is missing, damaged or not an image, or does not say which value is white.
    """
    with _opened(path) as file:
        file.load()
        with contextlib.suppress(Exception):  # EXIF may be damaged where the pixels are whole
            ImageOps.exif_transpose(file, in_place=True)
        return _eight_bits(file).convert(MODES[channels])


def check_image(path: str | Path) -> None:
    """Raises UnreadableImageError if the file's first bytes show that it is not an image."""
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The image file. Whatever is wrong with it, also inside the block, ends in an UnreadableImageError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")  # a pipe would never end
        with warnings.catch_warnings():  # raised above 89 megapixels; above twice as many Pillow raises an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path, formats=FORMATS)
        with file:
            yield file
    except Exception as error:  # decoders fail in any way on a malformed file
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = f"its format is not one of {', '.join(FORMATS)}" if unknown else reason
        raise UnreadableImageError(f"{path} cannot be read as an image: {reason}") from error


def _eight_bits(file: Image.Image) -> Image.Image:
    if file.mode not in ("I", "F") and not file.mode.startswith("I;16"):
        return file
    if file.mode == "F" or (file.mode == "I" and file.format not in ("PNG", "PPM")):
        kind = "floating-point" if file.mode == "F" else "signed or 32-bit"
        raise ValueError(f"its values are {kind} numbers, and nothing says which is white; save it in 8 or 16 bits")
    tags = getattr(file, "tag_v2", {})  # a TIFF may have 12 bits
    white = 2 ** tags.get(BITS, (16,))[0] - 1
    pixels = (np.asarray(file).astype(np.uint32) * 255 + white // 2) // white
    pixels = pixels.clip(max=255).astype(np.uint8)
    return Image.fromarray(255 - pixels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else pixels)


class Preprocessing(InputFormat):
    """The test crop: resize until the centred crop of ``size`` covers ``crop_pct`` of the shorter side, then cut it.

    Sides are rounded as torchvision's ``Resize`` and ``CenterCrop`` do, which the published numbers were measured
    with; a ``crop_pct`` above 1 leaves a black frame, as there. Interpolation is antialiased. Then (x / 255 − mean) /
    std, channel by channel.
    """

    @classmethod
    def of(
        cls,
        model: BackboneContract,
        size: tuple[int, int] | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """What the model's weights expect, except for what is given here.

        Raises:
            ValueError: the model takes images of neither 1 nor 3 channels.
        """
        config = model.default_cfg
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if model.in_chans not in MODES:
            raise ValueError(f"in_chans must be 1 or 3 for image files, got {model.in_chans}")
        if model.in_chans == 1:  # grey: the mean of the three channels
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        size = size or tuple(config["input_size"][1:])
        return cls(size, crop_pct or config["crop_pct"], interpolation or config["interpolation"], mean, std)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of the image that the model sees, resized to ``size``."""
        longest = math.ceil(LONGEST * max(self.size) / min(self.size) * min(image.size))
        if max(image.size) > longest:  # a strip might take gigabytes if it were resized as a whole
            left, top = (max(0, side - longest) // 2 for side in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
        targets = [math.floor(side / self.crop_pct) for side in self.size]
        sides = [image.height, image.width]
        axis = max((0, 1), key=lambda axis: targets[axis] / sides[axis])  # the side that just fits
        resized = [max(1, targets[axis] * side // sides[axis]) for side in sides]
        resized[axis] = targets[axis]
        image = image.resize((resized[1], resized[0]), RESAMPLING[self.interpolation])
        top, left = (_centred(side, length) for side, length in zip(self.size, resized, strict=True))
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def normalise(self, image: Image.Image) -> Tensor:
        """[channels, height, width], float32."""
        pixels = np.array(image, dtype=np.float32).reshape(image.height, image.width, -1)
        x = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalise(self.crop(image))


def _centred(length: int, available: int) -> int:
    """First pixel of ``length`` centred pixels; negative if they are more than are ``available``."""
    return -((length - available) // 2) if length > available else round((available - length) / 2)
