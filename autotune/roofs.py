"""``autotune.roofline``: operators, and results of ``compare`` and ``sweep``, under the ceilings measured here."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from autotune import plots, timing, workloads
from autotune.ceilings import matmul_rate
from autotune.contest import NAIVE, Contest
from autotune.measure import Settings
from autotune.operators import measure_operator
from autotune.passes import PASSES
from autotune.sweeps import Sweep

CACHED_BYTES = (2**18, 2**20, 2**22)  # of a tensor
# Points nearer to each other than this factor are drawn side by side.
APART = 1.14


class Ceilings(NamedTuple):
    """Bytes per second of a large copy, operations per second of a matrix product, bytes per second of a cached copy.

    The last is None where tensors never stay in caches: on a GPU these are overwritten before each run.
    """

    bytes_per_second: float
    operations_per_second: float
    cached_bytes_per_second: float | None = None

    @property
    def balance(self) -> float:
        """Operations per byte above which the matrix product's rate limits, not the memory's."""
        return self.operations_per_second / self.bytes_per_second


class Measured(NamedTuple):
    """One operator at one shape: what it must move and do, and the seconds of the paths that were measured."""

    operator: str
    shape: str
    floor_bytes: int
    operations: int
    seconds: dict[str, float]  # of "ours" and, where it was measured, of "naive"

    @property
    def intensity(self) -> float:
        """Operations per byte that must be moved."""
        return self.operations / self.floor_bytes


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """All in this run, on this device, with as many CPU threads as the kernels use: PyTorch's."""
    if device.type != "cpu":
        return Ceilings(timing.copy_bandwidth(device), matmul_rate(device, dtype, 8192, 1.0))
    large = timing.copy_bandwidth(device, seconds=0.3)
    cached = max(timing.copy_bandwidth(device, size=size, seconds=0.1) for size in CACHED_BYTES)
    return Ceilings(large, matmul_rate(device, dtype, 768, 0.3), cached if cached > 1.2 * large else None)


def from_row(row: Mapping[str, Any]) -> Measured:
    """A row of ``measure_operator`` with its workload's facts, as bench.json holds them.

    A call that was captured as a CUDA graph has the graph's time: the host that launches it has no part in a roofline.
    """
    found, floor = row.get("graph", row["contenders"]), row["floor"]
    seconds = {path: found[path]["p50_ms"] / 1000 for path in ("ours", "naive") if path in found}
    return Measured(row["operator"], f"{row['model']} {row['shape']}", floor["bytes"], floor["operations"], seconds)


def measure_operators(
    device: torch.device, dtype: torch.dtype, ceilings: Ceilings, operators: Sequence[str]
) -> list[Measured]:
    """Operators at the models' shapes, forward; in batches of 4 on a CPU and of 128 on a GPU."""
    on_gpu = device.type == "cuda"
    settings = Settings(device, dtype, seconds=0.5 if on_gpu else 0.1, min_runs=3)
    settings.ceilings["copy_bytes_per_second"] = ceilings.bytes_per_second
    return [
        from_row(workload.facts | measure_operator(workload, settings))
        for workload in workloads.operator_workloads(128 if on_gpu else 4)
        if workload.operator in operators
    ]


def roofline(*what: Contest | Sweep | str) -> Figure:
    """Anything under the roof that this device's copies and matrix products make.

    Args:
        what: results of ``compare`` and ``sweep``, all of one device, number of CPU threads and precision, and names of
            operators, which are measured at the models' shapes; without any, every operator that the models call.

    Raises:
        TypeError, ValueError: one of them is something else; nothing was measured then.
    """
    known = list(dict.fromkeys(workload.operator for workload in workloads.operator_workloads(1)))
    results = [entry for entry in what if isinstance(entry, (Contest, Sweep))]
    names: list[Any] = [entry for entry in what if entry not in results] or ([] if results else known)
    for entry in names:
        if not isinstance(entry, str):
            raise TypeError(f"what must be results of compare or sweep, or names, got {type(entry).__name__}")
        if entry not in known:
            raise ValueError(f"what must name some of {', '.join(known)}; got {entry!r}")
    place = timing.best_device()
    dtype, threads = timing.usual_dtype(place), torch.get_num_threads()
    if results:
        places = {(result.device, result.dtype, result.threads) for result in results}
        if len(places) > 1:
            texts = sorted(f"{kind} {name} on {count} threads" for kind, name, count in places)
            raise ValueError(f"what must be of one device, precision and number of threads, got {', '.join(texts)}")
        ((kind, name, threads),) = places
        place, dtype = torch.empty(0, device=kind).device, getattr(torch, name)
    measured = [entry for result in results for entry in _of_result(result)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ceilings = measure_ceilings(place, dtype)
        measured += measure_operators(place, dtype, ceilings, names)
        label = timing.label(place, dtype)
    finally:
        torch.set_num_threads(before)
    return roofline_figure(measured, ceilings, label)


def _of_result(result: Contest | Sweep) -> Iterator[Measured]:
    if isinstance(result, Sweep):
        for row in result.rows:
            seconds = {path: row[f"{path}_ms"] / 1000 for path in ("ours", "naive") if row[f"{path}_ms"]}
            shape = f"{row['axis']} {row[row['axis']]}"
            yield Measured(result.operator, shape, row["floor_bytes"], row["operations"], seconds)
        return
    if not result.operations:
        raise ValueError(f"what must do something that PyTorch's counter knows, {result.title} has no operations")
    times = {kind: [row["p50_ms"] / 1000 for row in result.timed if row["kind"] == kind] for kind in ("ours", NAIVE)}
    seconds = {kind: min(found) for kind, found in times.items() if found}
    seconds = seconds if "ours" in seconds else {"ours": seconds[NAIVE]}
    yield Measured(result.title, PASSES[result.backward], result.floor_bytes, result.operations, seconds)


def _side_by_side(values: Sequence[float]) -> list[float]:
    """The values, with those that would hide each other moved apart, to the right."""
    drawn, last = list(values), 0.0
    for index in sorted(range(len(values)), key=values.__getitem__):
        last = drawn[index] = max(values[index], APART * last)
    return drawn


def _with_unit(value: float, unit: str) -> str:
    """Three digits and a prefix: 30.5 GB/s, 678 Top/s."""
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def roofline_figure(measured: Sequence[Measured], ceilings: Ceilings, label: str) -> Figure:
    """Operations per second over operations per byte, log-log, under the ceilings; a line joins the two paths.

    The number at each line is that of its shape in the list at the side.
    """
    operators = list(dict.fromkeys(entry.operator for entry in measured))
    markers = dict(zip(operators, cycle(("o", "s", "D", "^", "v", "P", "X", "p")), strict=False))
    grey, guide, limit = plots.COLOURS["floor"], plots.COLOURS["guide"], ceilings.operations_per_second
    with plots.style():
        figure, axes = plots.grid(1, 1, 12, max(5.6, 2.2 + 0.24 * len(measured)))
        axis = axes[0][0]
        drawn = _side_by_side([entry.intensity for entry in measured])
        roofs = {f"copy in memory: {_with_unit(ceilings.bytes_per_second, 'B/s')}": (ceilings.bytes_per_second, "-")}
        if (cached := ceilings.cached_bytes_per_second) is not None:
            roofs[f"copy in caches: {_with_unit(cached, 'B/s')}"] = cached, "--"
        bends = [limit / speed for speed, _ in roofs.values()]
        low, high = min([*drawn, *bends]) / 2, max([*drawn, *bends]) * 2
        handles = []
        for (text, (speed, line)), bend in zip(roofs.items(), bends, strict=True):
            heights = [min(x * speed, limit) / 1e9 for x in (low, bend, high)]
            handles += axis.plot((low, bend, high), heights, line, color=grey, linewidth=2.2, label=text)
        roomy = min(bends) < math.sqrt(low * high)  # for a text that begins where the roof does
        axis.annotate(
            f"matrix product: {_with_unit(limit, 'op/s')}", (min(bends) if roomy else high, limit / 1e9), (0, 5),
            textcoords="offset points", color=grey, ha="left" if roomy else "right",
        )  # fmt: skip
        for number, (entry, x) in enumerate(zip(measured, drawn, strict=True), 1):
            rates = {name: entry.operations / seconds / 1e9 for name, seconds in entry.seconds.items()}
            axis.vlines(x, min(rates.values()), max(rates.values()), color=guide, linewidth=2, zorder=1)
            for name, rate in reversed(rates.items()):  # ours above naive and smaller: where both are equal, each shows
                size = 10 if name == "naive" else 7
                axis.plot(x, rate, markers[entry.operator], color=plots.COLOURS[name], markersize=size)
            axis.annotate(
                str(number), (x, max(rates.values())), (0, 7), textcoords="offset points", ha="center", fontsize=9
            )
        for name in ("ours", "naive"):
            handles += axis.plot([], [], "s", color=plots.COLOURS[name], label=name)
        for number, entry in enumerate(measured, 1):
            text = f"{number}  {entry.operator}  {entry.shape}".rstrip()
            handles += axis.plot([], [], markers[entry.operator], color="white", markeredgecolor="black", label=text)
        figure.legend(handles=handles, loc="outside right center", fontsize=9)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="operations per byte that must move (equal ones are drawn side by side)",
            ylabel="rate, 10⁹ operations/s  (more is better)",
        )
        # A busy machine's roofs come out too low, and lines above them are to be seen.
        fastest = max(entry.operations / min(entry.seconds.values()) for entry in measured)
        axis.set_ylim(top=2 * max(limit, fastest) / 1e9)
        axis.grid(which="major")
        return plots.finish(figure, "Under the roofline", label)
