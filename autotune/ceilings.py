"""What the hardware allows, measured: copy bandwidth, matrix-product rates, and the host's time for a launch."""

import functools
import statistics
from typing import Any

import torch
from torch.utils.benchmark import Timer

from autotune import timing
from kernels.launch import record_launches
from kernels.registration import spelled
from kernels.windows import Window


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Operations per second of a size³ matrix product on random data (zeros run faster)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        rows = a.chunk(torch.get_num_threads() if device.type == "cpu" else 1)
        parts = [functools.partial(torch.matmul, row, b) for row in rows]
        return 2 * size**3 / timing.ceiling_seconds(parts, device, seconds)
    finally:
        torch.set_float32_matmul_precision(precision)


def measure_ceilings(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """Copy bandwidth (bytes read and written per second) and the rates of matrix products (operations per second).

    In bfloat16 a product runs on the matrix units; in float32, TF32 being off, on the units of ordinary arithmetic,
    which also do the sums of most kernels here.
    """
    seconds = 0.05 if quick else 1.0
    return {
        "copy_bytes_per_second": timing.copy_bandwidth(device, size=2**20 if quick else None, seconds=seconds),
        "bf16_operations_per_second": matmul_rate(device, torch.bfloat16, 128 if quick else 8192, seconds),
        "fp32_operations_per_second": matmul_rate(device, torch.float32, 128 if quick else 4096, seconds),
    }


def launch_overhead(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Host microseconds of one launch of ``aggregate`` on a map so small that the device never keeps the host waiting.

    ``direct`` is ``kernel[grid](...)`` with its arguments made beforehand; ``configured`` our launcher with the config
    given, which adds the output's allocation and the arguments; ``tuned`` the same asking the tuner, whose answer is in
    memory; ``operator`` the call through PyTorch's dispatcher.
    """
    from kernels.aggregation import op, rows

    window = Window((3, 3), padding=(1, 1))
    weight = torch.randn(1, 1, 3, 3, 4, 4, device=device)
    x = torch.randn(1, 1, 16, 4, 4, device=device)
    config = rows.aggregate.choose(weight, x, window)
    with record_launches() as launches:
        rows.aggregate(weight, x, window, config=config)
    kernel, grid, arguments, options = launches[0]
    calls: dict[str, Any] = {
        "direct": lambda: kernel[grid](**arguments, **options),
        "configured": lambda: rows.aggregate(weight, x, window, config=config),
        "tuned": lambda: rows.aggregate(weight, x, window),
        "operator": lambda: op.aggregate(weight, x, spelled(window), "triton"),
    }
    timers = {name: Timer("call()", globals={"call": call}) for name, call in calls.items()}
    runs, turns = (1, 1) if quick else (200, 9)
    rounds = [{name: 1e6 * timer.timeit(runs).mean for name, timer in timers.items()} for _ in range(turns)]
    found = {name: statistics.median(times[name] for times in rounds) for name in calls}
    return found | {"added": found["tuned"] - found["direct"], "added_by_tuner": found["tuned"] - found["configured"]}
