"""The table of operators that ``test_conformance`` runs over: a new operator is one row here."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from kernels.reference import _pair
from kernels.windows import Pair, Window
from tests.kernels.row import Case, Operator, Shapes

Size = int | Pair


def _outputs(size: Pair, kernel_size: Size, stride: Size = 1, padding=None, dilation: Size = 1):
    (rows, columns), dilation = _pair(kernel_size), _pair(dilation)
    same = (rows - 1) * dilation[0] // 2, (columns - 1) * dilation[1] // 2
    window = Window((rows, columns), _pair(stride), same if padding is None else _pair(padding), dilation)
    return window.output_size(*size)


def involution(size: Pair, channels: int, groups: int, kernel_size: Size, **options: Any) -> Case:
    outputs = _outputs(size, kernel_size, **options)
    return Case({"x": ("B", channels, *size), "weight": ("B", groups, *_pair(kernel_size), *outputs)}, options)


def generated(
    size: Pair, channels: int, groups: int, kernel_size: int, features: int, bias: bool = True, **options: Any
) -> Case:
    entries = groups * math.prod(_pair(kernel_size))
    inputs: Shapes = {
        "x": ("B", channels, *size),
        "features": ("B", features, *_outputs(size, kernel_size, **options)),
        "weight": (entries, features),
    }
    inputs |= {"bias": (entries,)} if bias else {}
    return Case(inputs, {"kernel_size": kernel_size, "groups": groups, **options})


def neighborhood(
    names: tuple[str, ...], size: Pair, heads: int, channels: int, kernel_size: Size, dilation: Size = 1, bias=True
) -> Case:
    """The arguments ``names``: attn and logits are kernels, others features; with attn there is no table of biases."""
    rows, columns = _pair(kernel_size)
    shapes = {name: rows * columns if name in ("attn", "logits") else channels for name in names}
    inputs: Shapes = {name: ("B", heads, *size, last) for name, last in shapes.items()}
    if bias and "attn" not in names:
        inputs["rpb"] = (heads, 2 * rows - 1, 2 * columns - 1)
    return Case(inputs, {"kernel_size": kernel_size, "dilation": dilation})


def contmix(
    size: Pair, groups: int, query_channels: int, channels: int, context: int, kernel_sizes: tuple[int, ...]
) -> Case:
    positions = sum(kernel_size**2 for kernel_size in kernel_sizes)
    inputs: Shapes = {
        "query": ("B", groups, query_channels, *size),
        "key": ("B", groups, query_channels, context),
        "value": ("B", len(kernel_sizes), groups, channels, *size),
        "proj_weight": (positions, context),
        "proj_bias": (positions,),
    }
    inputs |= {f"rpb[{m}]": (groups, 2 * k - 1, 2 * k - 1) for m, k in enumerate(kernel_sizes)}
    return Case(inputs, {"kernel_sizes": kernel_sizes})


def outlook(
    size: Pair, heads: int, channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1, **options: Any
) -> Case:
    windows = [-(-length // stride) for length in size]
    options |= {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    shape = ("B", *windows, heads, kernel_size**2, kernel_size**2)
    return Case({"logits": shape, "value": ("B", *size, heads * channels)}, options)


def depthwise(size: Pair, channels: int, kernel_size: int, bias: bool = True) -> Case:
    inputs: Shapes = {"x": ("B", channels, *size), "weight": (channels, 1, kernel_size, kernel_size)}
    return Case(inputs | ({"bias": (channels,)} if bias else {}))


MAP = (5, 4)
SCALES = ((7, 7), (14, 14), (56, 56), (200, 320))
MAPS = (MAP, (5, 1), (1, 4), *SCALES)
PIXELS = math.prod(MAP)

# At 14x14 with K = 13 nearly every window is clamped, at 7x7 with K = 7 all outputs share one, at 9x8 with K = 7 some
# do; 13x10 with dilation 3 has residue classes of different sizes. Of these maps some share windows, others do not.
NEIGHBORHOODS: Shapes = {
    "plain": (MAP, 2, 3, 3),
    "interior": ((7, 9), 2, 5, 3),
    "shared windows": ((9, 8), 2, 10, 7),
    "one window": ((7, 7), 1, 4, 7),
    "four windows": ((6, 6), 2, 3, 5),
    "border": ((14, 14), 2, 3, 13, 1, False),
    "dilated": ((13, 10), 1, 3, 3, 3),
    "per axis": ((9, 8), 1, 2, (3, 5), (2, 1)),
    "one column": ((5, 1), 2, 3, (3, 1)),
    "one row": ((1, 4), 1, 1, (1, 3)),
}


def every(*choices: Iterable[Any]) -> Callable[[Callable[..., Case | None]], tuple[Case, ...]]:
    """``every(sizes, heads)(case)``: all that ``case`` makes of one choice of each."""
    combinations = list(itertools.product(*choices))
    return lambda case: tuple(made for made in itertools.starmap(case, combinations) if made is not None)


def neighborhoods(*names: str) -> dict[str, Any]:
    def scale(size: Pair, heads: int, channels: int, kernel_size: int) -> Case | None:
        bias = "logits" in names  # elsewhere PyTorch adds it: slow on meta tensors, and no launch
        return neighborhood(names, size, heads, channels, kernel_size, 1, bias) if kernel_size <= size[0] else None

    return {
        "cases": {name: neighborhood(names, *sizes) for name, sizes in NEIGHBORHOODS.items()},
        "scales": every(SCALES, (1, 4), (1, 10, 16, 32, 64), (3, 7, 13))(scale),
        "multiply_adds": (2 * 9 * 3 * PIXELS, 2 * 2 * 9 * 3 * PIXELS),
        "like": names[1],
    }


OPERATORS = [
    Operator(
        "involution2d",
        {
            "plain": involution(MAP, 6, 2, 3),
            "tiles": involution((9, 10), 10, 2, (4, 3), stride=(1, 2), padding=(2, 1)),
            "stride 2": involution((9, 8), 4, 1, 3, stride=2),
            "stride 3, dilation 2": involution((11, 10), 3, 3, 3, stride=3, dilation=2),
            "each axis": involution((11, 10), 4, 2, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(3, 2)),
            "a row": involution((8, 9), 2, 1, (1, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
            "even window": involution((6, 7), 4, 2, 4, padding=1),
            "unpadded": involution((7, 7), 5, 5, 7, padding=0),
            "more padding than window": involution((4, 3), 2, 1, (2, 3), padding=(4, 5)),
            "in pieces": involution((4, 5), 6, 2, (17, 18), stride=(1, 2), dilation=(2, 1)),
            "too sparse for registers": involution((12, 11), 6, 2, 3, stride=5, padding=9, dilation=9),
            "one pixel": involution((1, 1), 2, 2, 1),
        },
        every(SCALES, (1, 4, 32), (1, 5, 16, 100), (1, 3, 7, 16, 35), (1, 3, 4))(
            lambda size, groups, channels, k, stride: involution(size, groups * channels, groups, k, stride=stride)
        ),
        (6 * 9 * PIXELS, 2 * 6 * 9 * PIXELS),
        twice=True,
        like="x",
        free={"weight": (1,)},
        steps=("kernels.aggregation.eager_tiles.STEP_ELEMENTS",),
    ),
    Operator(
        "involution2d_generate",
        {
            "plain": generated(MAP, 6, 2, 3, 4),
            "tiles": generated((9, 5), 6, 2, 3, 20),
            "strided": generated((9, 7), 6, 2, 3, 70, bias=False, stride=2, dilation=2),
        },
        every(SCALES, (1, 4, 32), (1, 2, 5, 16), (3, 7, 16), ((1, 32), (2, 32), (1, 400)))(
            lambda size, groups, channels, k, rest: generated(
                size, groups * channels, groups, k, rest[1], stride=rest[0]
            )
        ),
        (18 * (4 + 3) * PIXELS, 2 * 18 * (4 + 3) * PIXELS),
        twice=False,
        like="x",
        steps=("kernels.involution.generate.STEP_BYTES", "kernels.involution.generate.STEP_BYTES_ELSEWHERE"),
    ),
    Operator("na2d_av", **neighborhoods("attn", "value"), twice=True, spreads={"gradient": 1}, free={"value": (4,)}),
    Operator("na2d_qk", **neighborhoods("query", "key"), twice=True),
    Operator(
        "na2d_softmax_av",
        **neighborhoods("logits", "value"),
        twice=False,
        logits=("logits",),
        masked=True,
        spreads={"gradient": 1},
        free={"value": (4,)},
    ),
    Operator(
        "contmix2d",
        {
            "plain": contmix(MAP, 2, 3, 4, 5, (1, 3)),
            "own windows": contmix((8, 7), 3, 3, 5, 6, (3, 5)),
            "shared windows": contmix((8, 7), 2, 3, 5, 6, (7,)),
            "one window": contmix((7, 7), 2, 3, 5, 6, (5, 7)),
            "three sizes": contmix((9, 8), 2, 3, 5, 6, (3, 5, 7)),
            "large windows": contmix((9, 17), 2, 3, 5, 6, (7,)),
            # Three tiles of inputs side by side, windows clamped in the first and the last.
            "wide": contmix((5, 37), 2, 3, 5, 6, (5,)),
        },
        every(SCALES, (1, 4, 8), (3, 16, 32, 64), (3, 5, 7, 13))(
            lambda size, groups, channels, k: contmix(size, groups, 16, channels, 49, (k,)) if k <= size[0] else None
        ),
        # The keys are projected once, 2·3·5 by 10; logits and mixed values are computed for every pixel.
        (2 * 10 * (3 + 4) * PIXELS + 2 * 3 * 5 * 10, 2 * 10 * (3 * 3 + 2 * 4) * PIXELS + 2 * 2 * 3 * 5 * 10),
        twice=False,
        like="value",
        logits=("proj_bias",),
        free={"value": (3,)},
        steps=("kernels.contmix.parts.MOST_STORED",),
        rounding=2,
    ),
    Operator(
        "outlook_attention2d",
        {
            "plain": outlook(MAP, 2, 3, stride=2),
            "tiles": outlook((4, 3), 2, 33, 2, 2, 1, scale=0.5),
            "VOLO": outlook((7, 6), 2, 5, stride=2, scale=0.6),
            "every pixel": outlook((4, 5), 1, 3, scale=-0.5),
            "uniform": outlook((4, 5), 1, 3, scale=0),
            "touching": outlook((5, 4), 2, 3, stride=3, padding=2),
            "even": outlook((3, 5), 3, 2, 2, 1, 0),
            "gaps": outlook((7, 6), 1, 4, 2, 3, 1),
            "large windows": outlook((4, 5), 1, 3, 5, 3, 2),
            # Windows hold a pixel once, twice or four times, some none at all.
            "wide overlap": outlook((4, 3), 1, 2, 4, 3, 3),
            "pointwise": outlook((2, 3), 2, 2, 1, 1, 0),
        },
        every(((14, 14), (28, 28)), (1, 6), (1, 12, 32, 33, 64, 96, 200), (1, 2, 3, 5, 7), (1, 2))(
            lambda size, heads, channels, k, stride: outlook(size, heads, channels, k, stride, k // 2)
        ),
        (3 * 2 * 9 * 9 * 6, 2 * 3 * 2 * 9 * 9 * 6),
        twice=False,
        like="value",
        logits=("logits",),
        masked=True,
        free={"logits": (3,), "value": (1,)},
        steps=("kernels.outlook.eager.BLOCK_ELEMENTS",),
    ),
    Operator(
        "depthwise_conv2d",
        {
            "plain": depthwise(MAP, 6, 5),
            "tiles": depthwise((11, 18), 2, 5),
            # Rows of a multiple of 16 bytes, which are not copied, and longer than a window; one tile wide, which both
            # axes cut short; five tiles with halos, the last of them cut; a kernel wider than the map; two blocks of 64
            # channels. On a CPU K chooses between several of PyTorch's convolutions.
            "rows in place": depthwise((9, 16), 2, 13),
            "K=17": depthwise((9, 21), 3, 17),
            "halos": depthwise((5, 37), 2, 9),
            "one tile": depthwise((7, 7), 2, 7),
            "K=31": depthwise((5, 34), 2, 31),
            "pointwise": depthwise((3, 9), 3, 1, bias=False),
            "two channel blocks": depthwise((6, 5), 70, 5),
            "K=13": depthwise((9, 12), 20, 13),
            "K=15": depthwise((9, 12), 20, 15),
        },
        every((*SCALES, (200, 9), (14, 17), (14, 33), (14, 65), (1, 1)), (1, 64), range(1, 32, 2))(depthwise),
        (6 * 25 * PIXELS, 2 * 6 * 25 * PIXELS),
        twice=True,
        like="x",
        spreads={"x": 2, "weight": 1, "gradient": 2},
        free={"x": (0, 2, 3)},
        steps=("kernels.depthwise.eager.GRADIENT_ELEMENTS",),
    ),
]
OPERATOR = {operator.name: operator for operator in OPERATORS}
