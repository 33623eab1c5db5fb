"""Types of command-line arguments, for ``python -m models`` and ``python -m autotune`` alike."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 2**31 - 1  # bound of whole numbers that have no other
LONGEST_SIDE = 16384


@dataclass(frozen=True)
class Number:
    """A number within bounds: a type for argparse, and a check of values that come from Python."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False
    noun: str = ""

    def holds(self, value: Any) -> bool:
        kind = isinstance(value, (int, float)) and math.isfinite(value)
        if self.whole:
            kind = isinstance(value, int) and value <= (LARGEST if math.isinf(self.at_most) else self.at_most)
        return kind and self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"above": self.above, "of at least": self.at_least, "below": self.below, "of at most": self.at_most}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if not math.isinf(bound))
        return f"{self.noun or ('an integer' if self.whole else 'a finite number')} {words}".strip()

    def __call__(self, text: str) -> float:
        try:
            value = (int if self.whole else float)(text)
        except ValueError:
            value = math.nan
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"must be {self}, got {text!r}")
        return value


positive = Number(at_least=1, whole=True)
natural = Number(at_least=0, whole=True)
processes = Number(at_least=0, at_most=1024, whole=True)
seconds = Number(above=0, noun="a finite number of seconds")
FRACTION = Number(at_least=0, at_most=1)


def device(text: str) -> torch.device:
    """A device that exists here and computes: cpu, cuda (any GPU), cuda:1."""
    try:
        place = torch.device(text)
        if torch.empty(0, device=place).is_meta:
            raise RuntimeError("meta tensors hold no values")
        return place
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device present here, got {text!r}: {reason}") from None


def dtype(text: str) -> torch.dtype:
    """fp32, bf16 or fp16, or PyTorch's name for it."""
    names = DTYPES | {str(kind).removeprefix("torch."): kind for kind in DTYPES.values()}
    if text not in names:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}; got {text!r}")
    return names[text]


def image_size(text: str) -> tuple[int, int]:
    """SIDE or HEIGHTxWIDTH."""
    sides = [int(side) if side.isdecimal() and len(side) < 10 else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 32 or max(sides) > LONGEST_SIDE:
        bound = f"at most {LONGEST_SIDE}" if max(sides) > LONGEST_SIDE else "at least 32"
        raise argparse.ArgumentTypeError(f"must be SIDE or HEIGHTxWIDTH, {bound} pixels each, got {text!r}")
    return sides[0], sides[-1]
