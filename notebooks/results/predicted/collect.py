"""Write what the emulator predicts for the public operators to a file beside this one, named after the Triton at hand.

    python -m notebooks.results.predicted.collect FOLDER_OF_THE_EMULATOR [CASE ...]

from the repository's root; the folder holds ``predict.py``. Cases that begin with a name replace those of the file, the
others stay. Takes minutes. Times are sums over a case's launches, in microseconds.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import kernels
from kernels.depthwise.expanded import expanded_convolve
from kernels.depthwise.op import normed_branches
from kernels.depthwise.sliding import gelu_convolve
from kernels.images import image_conv2d
from models.layers import DilatedReparamBlock

Case = tuple[Any, tuple[Any, ...], dict[str, Any]]  # function, tensors and options, as the emulator's cases are


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _map(batch: int, channels: int, side: int) -> Tensor:
    return _empty(batch, side, side, channels).permute(0, 3, 1, 2)


def _depthwise(batch: int, channels: int, side: int, fused: bool = False) -> Case:
    """A 3×3 depthwise convolution, or one of GELU."""
    function = (lambda *given: gelu_convolve(*given, True)[0]) if fused else kernels.depthwise_conv2d
    return function, (_map(batch, channels, side), _empty(channels, 1, 3, 3), _empty(channels)), {}


def _expanded(batch: int, inputs: int, channels: int, side: int) -> Case:
    """The same of GELU after a 1×1 convolution, in inference."""
    weights = _empty(channels, inputs), _empty(channels), _empty(channels, 1, 3, 3), _empty(channels)
    return lambda *given: expanded_convolve(*given, True)[0], (_map(batch, inputs, side), *weights), {}


def _images(batch: int, outputs: int, kernel_size: int) -> Case:
    """The first convolution of a network."""
    weight = _empty(outputs, kernel_size, kernel_size, 3).permute(0, 3, 1, 2)
    return (
        lambda x, weight: image_conv2d(x, weight, None, 2, kernel_size // 2, False),
        (_map(batch, 3, 224), weight),
        {},
    )


def _branches(batch: int, channels: int, side: int, kernel_size: int) -> Case:
    """All branches of a large kernel and their batch norms in training."""
    sizes, dilations = zip((kernel_size, 1), *DilatedReparamBlock.BRANCHES[kernel_size], strict=True)
    weights, scale = [_empty(channels, 1, size, size) for size in sizes], _empty(len(sizes), channels).float()
    return (
        lambda x, weights, scale, shift: normed_branches(x, weights, dilations, scale, shift, 1e-5)[0],
        (_map(batch, channels, side), weights, scale, scale[0].clone()),
        {},
    )


OTHERS = {
    "fused.56": (_depthwise, (128, 224, 56, True)),
    "fused.14": (_depthwise, (128, 768, 14, True)),
    "depthwise3.56": (_depthwise, (128, 224, 56)),
    "depthwise3.14": (_depthwise, (128, 768, 14)),
    "expanded.56": (_expanded, (128, 56, 224, 56)),
    "images.28": (_images, (128, 28, 3)),
    "images.64": (_images, (128, 64, 7)),
    "branches.56": (_branches, (128, 56, 56, 17)),
    "branches.28": (_branches, (128, 112, 28, 15)),
    "branches.14": (_branches, (128, 256, 14, 13)),
    "branches.7": (_branches, (128, 336, 7, 7)),
}
INFERENCE = ("expanded.56",)  # which has no backward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER_OF_THE_EMULATOR")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    given = parser.parse_args()
    sys.path.insert(0, given.folder)
    import predict  # pyright: ignore[reportMissingImports]

    predict.CASES.update(OTHERS)
    path = Path(__file__).with_name(f"triton_{triton.__version__}.json")
    rows = {(row["case"], row["pass"]): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    order = [name for name in predict.CASES if not given.cases or name.startswith(tuple(given.cases))]
    for name, kind in itertools.product(order, ("forward", "backward")):
        if name in INFERENCE and kind == "backward":
            continue
        launches = predict.run_case(predict.CASES[name], backward=kind == "backward")
        found = [predict.predict(launch) for launch in launches]
        if not found:
            continue
        longest = max(found, key=lambda launch: launch["predicted"])
        rows[name, kind] = {
            "case": name,
            "pass": kind,
            "launches": len(found),
            "floor_microseconds": round(sum(launch["floor"] for launch in found), 2),
            "microseconds": round(sum(launch["predicted"] for launch in found), 2),
            "bound_by": f"{longest['kernel']}: {longest['bound']}",
            "spilled_bytes": sum(launch["spilled"] for launch in found),
        }
        print(rows[name, kind], flush=True)
        cases = list(predict.CASES)
        ordered = sorted(rows.values(), key=lambda row: (cases.index(row["case"]), row["pass"] == "backward"))
        record = {"triton": triton.__version__, "architecture": "sm_90", "rows": ordered}
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
