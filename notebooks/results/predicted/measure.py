"""Measure on this GPU what collect.py predicts: the time of every kernel that a public operator launches.

    python -m notebooks.results.predicted.measure FILE.json [CASE ...]

from the repository's root. Cases carry collect.py's names. Each kernel's time is the median over runs between which the
GPU's L2 cache is overwritten, as read by PyTorch's profiler; in microseconds, in the order of the launches.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autotune import timing
from autotune.kernel_cases import branches, expanded, gelu, image
from autotune.measure import one_line
from autotune.workloads import Workload, channels_last, depthwise, operator_workloads
from kernels.files import write_json
from models.layers import DilatedReparamBlock
from notebooks.results.folder import case_of

RUNS = 9
CACHE = 512 << 20  # bytes; several times any L2


def parts() -> dict[str, Workload]:
    """3×3 depthwise convolutions, as training has them, and what of models has kernels of its own."""
    small = ((224, 56), (768, 14))
    found = {f"fused.{side}": gelu(128, channels, side) for channels, side in small}
    found |= {f"depthwise3.{side}": depthwise("OverLoCK-XT", 128, c, (side, side), 3) for c, side in small}
    found |= {"expanded.56": expanded(128, 56, 224, 56), "images.28": image(128, 28, 3), "images.64": image(128, 64, 7)}
    for channels, side, kernel_size in ((56, 56, 17), (112, 28, 15), (256, 14, 13), (336, 7, 7)):
        sizes = zip((kernel_size, 1), *DilatedReparamBlock.BRANCHES[kernel_size], strict=True)
        found[f"branches.{side}"] = branches(128, channels, side, *sizes)
    return found


def cases() -> dict[str, Workload]:
    """Every operator at the models' shapes, where maps lie channels last the other way, too; ContMix on a large one;
    and the parts of models."""
    large = [found for found in operator_workloads(2, (800, 1280)) if found.operator == "contmix2d"]
    found = {case_of(workload.operator, workload.shape): workload for workload in (*operator_workloads(128), large[0])}
    last = {name.removesuffix(".last"): case for name, case in found.items() if name.endswith(".last")}
    return found | parts() | {name: channels_last(case, False) for name, case in last.items()}


def kernel_times(call: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """Name and median microseconds of what a call launches, in order."""
    buffer = torch.ones(CACHE // 4, device=device)
    for _ in range(2):
        call()

    def turns() -> None:
        for _ in range(RUNS):
            buffer.sin_()
            call()

    runs: list[list[tuple[str, float]]] = []
    for name, time in timing.kernels_of(turns):
        if "sin_kernel" in name:
            runs.append([])
        elif runs:
            runs[-1].append((name, time))
    whole = [run for run in runs if [n for n, _ in run] == [n for n, _ in runs[-1]]]
    return [(run[0][0], statistics.median(t for _, t in run)) for run in zip(*whole, strict=True)]


def _predictions() -> dict[tuple[str, str], float]:
    """Case and pass -> what the newest file beside this one predicts; collect.py makes it of the code as it is."""
    newest = max(Path(__file__).parent.glob("triton_*.json"))
    return {(row["case"], row["pass"]): row["microseconds"] for row in json.loads(newest.read_text())["rows"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="what it writes, over what is there")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of names (default: all cases)")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and there is none here")
    device = timing.best_device()
    predicted = _predictions()
    rows: list[dict[str, Any]] = []
    for name, workload in cases().items():
        if given.cases and not name.startswith(tuple(given.cases)):
            continue
        try:
            inputs = workload.draw_inputs(torch.bfloat16, device)
            gradient = workload.draw_gradient(torch.bfloat16, device)
            passes: dict[str, Callable[[], Any]] = {"forward": functools.partial(workload.run, inputs)}
            if workload.trained:
                out, leaves = workload.function(**inputs), tree_leaves(inputs)
                passes["backward"] = functools.partial(torch.autograd.grad, out, leaves, gradient, retain_graph=True)
            for kind, call in passes.items():
                found = kernel_times(call, device)
                total = sum(time for _, time in found)
                launched = [{"kernel": kernel[:80], "microseconds": round(time, 2)} for kernel, time in found]
                row = {"case": name, "pass": kind, "microseconds": round(total, 2), "kernels": launched}
                rows.append(row | {"predicted_microseconds": predicted.get((name, kind))})
                told = (f"{kernel[:28]} {time:.1f}" for kernel, time in found)
                print(f"{name:20s} {kind:9s} {total:9.1f}", *told, sep="  ", flush=True)
        except Exception as error:  # the other cases still are worth their time
            rows.append({"case": name, "failed": one_line(error)})
            print(f"{name:20s} failed: {one_line(error)}", flush=True)
        write_json(given.file, {"schema": 1, "machine": timing.describe_machine(device), "rows": rows})


if __name__ == "__main__":
    main()
