"""The table of operators that ``test_conformance`` runs over: a new operator is one row here."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from tests.support import DEVICE, random_tensor


class Operator(NamedTuple):
    """``kernels.<name>`` at one small shape. ``rpb[0]``, ``rpb[1]`` are the entries of a list argument ``rpb``."""

    name: str
    inputs: dict[str, tuple[Any, ...]]  # shapes, with "B" for the batch
    options: dict[str, Any]
    multiply_adds: tuple[int, int]  # of one image: forward, backward
    twice: bool  # whether a second derivative exists
    logits: tuple[str, ...] = ()  # arguments that enter a softmax
    spreads: tuple[
        str, ...
    ] = ()  # backends on which a NaN reaches outputs that it should not, through a tile's product
    rounding: int = 1  # times the forward tolerance: products before a softmax round, and it amplifies that

    def tensors(self, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict[str, Tensor]:
        shapes = {name: [batch if size == "B" else size for size in shape] for name, shape in self.inputs.items()}
        return {name: random_tensor(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def __call__(self, tensors: dict[str, Tensor], module: ModuleType = kernels) -> Tensor:
        arguments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            name, bracket, _ = name.partition("[")
            if bracket:
                arguments.setdefault(name, []).append(tensor)
            else:
                arguments[name] = tensor
        return getattr(module, self.name)(**arguments, **self.options)

    def exact(self, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The float64 definition of the same values: output, and the inputs that its gradients belong to."""
        inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
        return self(inputs, kernels.reference), inputs


MAP = (5, 4)
PIXELS = math.prod(MAP)
HEADS = ("B", 2, *MAP)
ALIGNED, KERNEL, TABLE = (*HEADS, 3), (*HEADS, 9), (2, 5, 5)

OPERATORS = [
    Operator(
        "involution2d",
        {"x": ("B", 6, *MAP), "weight": ("B", 2, 3, 3, *MAP)},
        {},
        (6 * 9 * PIXELS, 2 * 6 * 9 * PIXELS),
        twice=True,
    ),
    Operator(
        "involution2d_generate",
        {"x": ("B", 6, *MAP), "features": ("B", 4, *MAP), "weight": (18, 4), "bias": (18,)},
        {"kernel_size": 3, "groups": 2},
        (18 * (4 + 3) * PIXELS, 2 * 18 * (4 + 3) * PIXELS),
        twice=False,
    ),
    Operator(
        "na2d_av",
        {"attn": KERNEL, "value": ALIGNED},
        {"kernel_size": 3},
        (2 * 9 * 3 * PIXELS, 2 * 2 * 9 * 3 * PIXELS),
        twice=True,
    ),
    Operator(
        "na2d_qk",
        {"query": ALIGNED, "key": ALIGNED, "rpb": TABLE},
        {"kernel_size": 3},
        (2 * 9 * 3 * PIXELS, 2 * 2 * 9 * 3 * PIXELS),
        twice=True,
    ),
    Operator(
        "na2d_softmax_av",
        {"logits": KERNEL, "value": ALIGNED, "rpb": TABLE},
        {"kernel_size": 3},
        (2 * 9 * 3 * PIXELS, 2 * 2 * 9 * 3 * PIXELS),
        twice=False,
        logits=("logits",),
    ),
    Operator(
        "contmix2d",
        {
            "query": ("B", 2, 3, *MAP),
            "key": ("B", 2, 3, 5),
            "value": ("B", 2, 2, 4, *MAP),
            "proj_weight": (10, 5),
            "proj_bias": (10,),
            "rpb[0]": (2, 1, 1),
            "rpb[1]": TABLE,
        },
        {"kernel_sizes": (1, 3)},
        # The keys are projected once, 2·3·5 by 10; logits, and values, for every pixel.
        (2 * 10 * (3 + 4) * PIXELS + 2 * 3 * 5 * 10, 2 * 10 * (3 * 3 + 2 * 4) * PIXELS + 2 * 2 * 3 * 5 * 10),
        twice=False,
        logits=("proj_bias",),
        rounding=2,
    ),
    Operator(
        "outlook_attention2d",
        {"logits": ("B", 3, 2, 2, 9, 9), "value": ("B", *MAP, 6)},
        {"stride": 2},
        (3 * 2 * 9 * 9 * 6, 2 * 3 * 2 * 9 * 9 * 6),
        twice=False,
        logits=("logits",),
    ),
    Operator(
        "depthwise_conv2d",
        {"x": ("B", 6, *MAP), "weight": (6, 1, 5, 5), "bias": (6,)},
        {},
        (6 * 25 * PIXELS, 2 * 6 * 25 * PIXELS),
        twice=True,
        spreads=("triton",),
    ),
]
