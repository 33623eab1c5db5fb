"""What the hardware allows, measured: copy bandwidth, matrix-product rates, and the host's time for a launch."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from autotune import timing
from kernels.launch import record_launches
from kernels.windows import Window


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Operations per second of a size³ matrix product on random data (zeros run faster)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        rows = a.chunk(torch.get_num_threads() if device.type == "cpu" else 1)
        return (
            2 * size**3 / timing.ceiling_seconds([functools.partial(torch.matmul, r, b) for r in rows], device, seconds)
        )
    finally:
        torch.set_float32_matmul_precision(precision)


def measure_ceilings(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and the rates (operations a second) of matrix products.

    In bfloat16 a product runs on the matrix units; in float32, TF32 being off, on the units of ordinary arithmetic,
    which also do the sums of most kernels here.
    """
    seconds = 0.05 if quick else 1.0
    return {
        "copy_bytes_per_second": timing.copy_bandwidth(device, size=2**20 if quick else None, seconds=seconds),
        "bf16_operations_per_second": matmul_rate(device, torch.bfloat16, 128 if quick else 8192, seconds),
        "fp32_operations_per_second": matmul_rate(device, torch.float32, 128 if quick else 4096, seconds),
    }


def _host_microseconds(
    calls: dict[str, Callable[[], object]], device: torch.device, *, runs: int, turns: int
) -> dict[str, float]:
    """Host time of a call: medians over rounds that take turns, each a run of calls without waiting for the device."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(turns):
        for name, call in calls.items():
            timing.synchronize(device)
            start = time.perf_counter()
            for _ in range(runs):
                call()
            rounds[name].append(1e6 * (time.perf_counter() - start) / runs)
    timing.synchronize(device)
    return {name: statistics.median(times) for name, times in rounds.items()}


def launch_overhead(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Host microseconds of one launch of ``aggregate`` on a map so small that the device never keeps the host waiting.

    ``direct`` is ``kernel[grid](...)`` with its arguments made beforehand; ``configured`` our launcher with the config
    given, which adds the output's allocation and the arguments; ``tuned`` the same asking the tuner, whose answer is in
    memory; ``operator`` the call through PyTorch's dispatcher.
    """
    from kernels.aggregation import op
    from kernels.aggregation.configs import gather_heuristic, gather_problem
    from kernels.aggregation.gather import gather_aggregate

    window = Window((3, 3), padding=(1, 1))
    weight = torch.randn(1, 1, 3, 3, 4, 4, device=device)
    x = torch.randn(1, 1, 16, 4, 4, device=device)
    config = gather_heuristic(gather_problem(weight, x, (4, 4), (3, 3)))
    with record_launches() as launches:
        gather_aggregate(weight, x, window, config=config)
    kernel, grid, arguments, options = launches[0]
    backend = "triton"
    found: dict[str, Any] = _host_microseconds(
        {
            "direct": lambda: kernel[grid](**arguments, **options),
            "configured": lambda: gather_aggregate(weight, x, window, config=config),
            "tuned": lambda: gather_aggregate(weight, x, window),
            "operator": lambda: op.aggregate(weight, x, window, backend),
        },
        device,
        runs=1 if quick else 200,
        turns=1 if quick else 9,
    )
    return found | {"added": found["tuned"] - found["direct"], "added_by_tuner": found["tuned"] - found["configured"]}
