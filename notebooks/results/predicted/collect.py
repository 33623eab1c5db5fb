"""Write what the emulator predicts for the public operators to a file beside this one, named after the Triton at hand.

    python notebooks/results/predicted/collect.py FOLDER_OF_THE_EMULATOR [CASE ...]

from the repository's root; the folder holds ``predict.py``. Cases that begin with a name replace those of the file, the
others stay. Takes minutes. Times are sums over a case's launches, in microseconds.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any


def _fused(batch: int, channels: int, side: int) -> tuple[Any, tuple[Any, ...], dict[str, bool]]:
    """A 3×3 depthwise convolution as inference has it: function, tensors and options, as the emulator's cases are."""
    import torch

    from kernels.depthwise.fused import fused_depthwise_conv2d

    x, weight, bias = (
        torch.empty(s, dtype=torch.bfloat16) for s in ((batch, channels, side, side), (channels, 1, 3, 3), channels)
    )
    return (
        lambda *tensors, **options: fused_depthwise_conv2d(*tensors, **options)[0],
        (x.to(memory_format=torch.channels_last), weight, bias),
        {"gelu": True, "squares": True},
    )


FORWARD_ONLY = {"fused.56": (_fused, (128, 224, 56)), "fused.14": (_fused, (128, 768, 14))}


def main(folder: str, *wanted: str) -> None:
    sys.path.insert(0, folder)
    import predict  # pyright: ignore[reportMissingImports]
    import triton

    predict.CASES.update(FORWARD_ONLY)
    path = Path(__file__).with_name(f"triton_{triton.__version__}.json")
    rows = {(row["case"], row["pass"]): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    order = [name for name in predict.CASES if not wanted or name.startswith(wanted)]
    for name, backward in itertools.product(order, (False, True)):
        if backward and name in FORWARD_ONLY:
            continue
        found = [predict.predict(launch) for launch in predict.run_case(predict.CASES[name], backward=backward)]
        if not found:
            continue
        longest = max(found, key=lambda launch: launch["predicted"])
        rows[name, "backward" if backward else "forward"] = {
            "case": name,
            "pass": "backward" if backward else "forward",
            "launches": len(found),
            "floor_microseconds": round(sum(launch["floor"] for launch in found), 2),
            "microseconds": round(sum(launch["predicted"] for launch in found), 2),
            "bound_by": f"{longest['kernel']}: {longest['bound']}",
            "spilled_bytes": sum(launch["spilled"] for launch in found),
        }
        print(rows[name, "backward" if backward else "forward"], flush=True)
        cases = list(predict.CASES)
        ordered = sorted(rows.values(), key=lambda row: (cases.index(row["case"]), row["pass"] == "backward"))
        record = {"triton": triton.__version__, "architecture": "sm_90", "rows": ordered}
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
