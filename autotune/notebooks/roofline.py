"""``autotune.roofline``, and notebook 02: operators fused and unfused, under the measured ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import kernels
from autotune import plots, report, timing, workloads
from autotune.bench_operators import contmix_chain
from autotune.ceilings import matmul_rate
from autotune.comparison import Settings, check, largest_error, measure_operator
from autotune.contest import NAIVE, Contest
from autotune.notebooks.session import Session, finish, grid, record_label, start
from autotune.sweeps import Sweep
from kernels import tolerances
from kernels.reference import rpb_logits
from kernels.windows import Window

__all__ = [
    "Ceilings",
    "Measured",
    "achieved_figure",
    "committed_figures",
    "from_record",
    "fusion_figure",
    "measure_ceilings",
    "measure_fusion",
    "measure_operators",
    "roofline",
    "roofline_figure",
]


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a large copy, and operations a second of a large matrix product in the session's precision."""

    bytes_per_second: float
    operations_per_second: float

    @property
    def balance(self) -> float:
        """Operations per byte above which the matrix product's rate limits, not the memory's."""
        return self.operations_per_second / self.bytes_per_second


@dataclass(frozen=True)
class Measured:
    """One operator at one shape: what it must move and do, and both paths' seconds (None: not measured)."""

    operator: str
    shape: str
    floor_bytes: int
    operations: int
    ours_seconds: float
    naive_seconds: float | None

    @property
    def intensity(self) -> float:
        """Operations per byte that must be moved."""
        return self.operations / self.floor_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """Of the paths that were measured."""
        return {"ours": self.ours_seconds} | ({"naive": self.naive_seconds} if self.naive_seconds else {})


def measure_ceilings(session: Session) -> Ceilings:
    """Both in this run, on this device: published peaks are not reached by anyone."""
    seconds, size = (1.0, 8192) if session.full else (0.3, 1024)
    return Ceilings(
        timing.copy_bandwidth(session.device, seconds=seconds),
        matmul_rate(session.device, session.dtype, size, seconds),
    )


def measure_operators(
    session: Session, ceilings: Ceilings, *, image: int = 224, operators: Sequence[str] = tuple(workloads.OPERATORS)
) -> list[Measured]:
    """Operators at the models' shapes, forward; batch 1 on a CPU, 128 on a GPU."""
    seconds = 0.5 if session.full else 0.05
    settings = Settings(session.device, session.dtype, seconds=seconds, min_runs=3)
    found = []
    for workload in workloads.operator_workloads(128 if session.full else 1, (image, image)):
        if workload.operator not in operators:
            continue
        row = measure_operator(workload, settings, backward=False, bytes_per_second=ceilings.bytes_per_second)
        found.append(
            Measured(
                workload.operator,
                f"{workload.model} {workload.shape}",
                row["floor"]["bytes"],
                row["operations"],
                row["ours"]["p50_ms"] / 1000,
                row["naive"]["p50_ms"] / 1000,
            )
        )
    return found


def roofline(*what: Contest | Sweep | str) -> Figure:
    """Anything under the roof that this device's copies and matrix products make.

    Args:
        what: results of ``compare`` and ``sweep``, all of one device and precision, and names of operators, which are
            measured at the models' shapes; without any, every operator that the models call.

    Raises:
        TypeError, ValueError: one of them is nothing of the kind; nothing was measured then.
    """
    known = list(dict.fromkeys(workload.operator for workload in workloads.operator_workloads(1)))
    results: list[Contest | Sweep] = []
    for entry in what:
        if isinstance(entry, (Contest, Sweep)):
            results.append(entry)
        elif not isinstance(entry, str):
            raise TypeError(f"what must be results of compare or sweep, or names, got {type(entry).__name__}")
        elif entry not in known:
            raise ValueError(f"what must name some of {', '.join(known)}; got {entry!r}")
    session = start()
    if results:
        if len(places := {(result.device, result.dtype) for result in results}) > 1:
            raise ValueError(f"what must be of one device and precision, got {sorted(map(' '.join, places))}")
        ((device, dtype),) = places
        session = Session(torch.device(device), getattr(torch, dtype), session.full and device == "cuda")
    measured = [entry for result in results for entry in _of_result(result)]
    ceilings = measure_ceilings(session)
    if names := [entry for entry in what if isinstance(entry, str)] or ([] if results else known):
        measured += measure_operators(session, ceilings, operators=names)
    return roofline_figure(measured, ceilings, session.label)


def _of_result(result: Contest | Sweep) -> list[Measured]:
    if isinstance(result, Sweep):
        return [
            Measured(result.operator, axis, p.floor_bytes, p.operations, p.ours_seconds, p.naive_seconds)
            for axis, points in result.points.items()
            for p in points
        ]
    if not result.operations:
        raise ValueError(f"what must do something that PyTorch's counter knows, {result.title} has no operations")
    seconds = {row["name"]: row["p50_ms"] / 1000 for row in result.timed if row["kind"] in ("ours", NAIVE)}
    naive = seconds.pop(NAIVE, None)
    ours = min(seconds.values()) if seconds else naive
    assert ours is not None
    return [Measured(result.title, "", result.floor_bytes, result.operations, ours, naive)]


def from_record(record: Mapping[str, Any]) -> tuple[list[Measured], Ceilings]:
    """The forward rows of a committed bench.json, of its first batch size, and the ceilings of the same run."""
    rows = [row for row in record["rows"] if row["status"] == "ok" and row["pass"] == "forward"]
    measured = []
    for row in rows:
        if row["batch"] == rows[0]["batch"]:
            seconds = {name: found["p50_ms"] / 1000 for name, found in row["contenders"].items()}
            floor = row["floor"]
            measured.append(
                Measured(
                    row["operator"],
                    f"{row['model']} {row['shape']}",
                    floor["bytes"],
                    floor["operations"],
                    seconds["ours"],
                    seconds.get("naive"),
                )
            )
    found = record["ceilings"]
    return measured, Ceilings(found["copy_bytes_per_second"], found["bf16_operations_per_second"])


def committed_figures(record: Mapping[str, Any]) -> list[Figure]:
    """Both figures of a committed bench.json; none where it holds no operator."""
    measured, ceilings = from_record(record)
    label = record_label(record)
    return [draw(measured, ceilings, label) for draw in (roofline_figure, achieved_figure) if measured]


def roofline_figure(measured: Sequence[Measured], ceilings: Ceilings, label: str) -> Figure:
    """Operations a second over operations per byte, log-log, under the two ceilings; a line joins the two paths."""
    operators = list(dict.fromkeys(entry.operator for entry in measured))
    markers = dict(zip(operators, cycle(("o", "s", "D", "^", "v", "P", "X")), strict=False))
    with plots.style():
        figure, axes = grid(1, 1, 10.5, 5.6)
        axis = axes[0][0]
        low = min(min(entry.intensity for entry in measured) / 2, ceilings.balance / 8)
        high = max(max(entry.intensity for entry in measured) * 2, ceilings.balance * 4)
        roof = [
            (x, min(x * ceilings.bytes_per_second, ceilings.operations_per_second) / 1e9)
            for x in (low, ceilings.balance, high)
        ]
        axis.plot(*zip(*roof, strict=True), color=plots.COLOURS["floor"], linewidth=2.4)
        axis.annotate(
            f"copy: {ceilings.bytes_per_second / 1e9:.3g} GB/s", (low * 1.6, roof[0][1] * 1.6), (10, -6),
            textcoords="offset points", va="top", color=plots.COLOURS["floor"],
        )  # fmt: skip
        rate = report.number(ceilings.operations_per_second / 1e9)
        axis.annotate(
            f"matrix product: {rate} Gop/s", (ceilings.balance, roof[-1][1]), (0, 5), textcoords="offset points",
            color=plots.COLOURS["floor"],
        )  # fmt: skip
        for entry in measured:
            rates = {name: entry.operations / seconds / 1e9 for name, seconds in entry.seconds.items()}
            least, most = min(rates.values()), max(rates.values())
            axis.vlines(entry.intensity, least, most, color=plots.COLOURS["guide"], linewidth=2, zorder=1)
            for name, rate in rates.items():
                axis.plot(entry.intensity, rate, markers[entry.operator], color=plots.COLOURS[name], markersize=8)
        handles = [axis.plot([], [], "s", color=plots.COLOURS[name], label=name)[0] for name in ("ours", "naive")]
        handles += [
            axis.plot([], [], marker, color="white", markeredgecolor="black", label=name)[0]
            for name, marker in markers.items()
        ]
        figure.legend(handles=handles, loc="outside right center")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="operations per byte that must move (1/B)",
            ylabel="rate, 10⁹ operations/s",
        )
        axis.grid(which="major")
        return finish(figure, "Operators under the roofline", label)


def achieved_figure(measured: Sequence[Measured], ceilings: Ceilings, label: str) -> Figure:
    """Bytes that must move over the time it took, of both paths, beside the speed of a copy."""
    with plots.style():
        figure, axes = grid(1, 1, 10.5, 1.5 + 0.36 * len(measured))
        axis = axes[0][0]
        positions = range(len(measured))
        for position, entry in zip(positions, measured, strict=True):
            rates = {name: entry.floor_bytes / seconds / 1e9 for name, seconds in entry.seconds.items()}
            least, most = min(rates.values()), max(rates.values())
            axis.hlines(position, least, most, color=plots.COLOURS["guide"], linewidth=2.5, zorder=1)
            for name, rate in rates.items():
                axis.plot(rate, position, plots.MARKERS[name], color=plots.COLOURS[name], label=name)
            axis.annotate(
                f"{rates['ours'] * 1e9 / ceilings.bytes_per_second:.0%}", (most, position), (8, 0),
                textcoords="offset points", va="center", fontsize=10, color=plots.COLOURS["ours"],
            )  # fmt: skip
        axis.axvline(ceilings.bytes_per_second / 1e9, color=plots.COLOURS["floor"], linestyle="--", label="copy")
        axis.set_yticks(positions, [f"{entry.operator}  {entry.shape}" for entry in measured], fontsize=10)
        axis.set_ylim(len(measured) - 0.5, -0.5)
        axis.set(xscale="log", xlabel="bytes that must move / time, GB/s  (more is better; %: ours of the copy)")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x")
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=3)
        return finish(figure, "Achieved bandwidth, forward", label)


@dataclass(frozen=True)
class Fusion:
    """A fused operator and the chain that computes the same; the floor is the fused one's."""

    name: str
    shape: str
    fused: Callable[[], Tensor]
    unfused: Callable[[], Tensor]
    floor_bytes: int


def fusions(session: Session) -> Iterator[Fusion]:
    """Kernels generated where they are used, at the shapes of RedNet-50 and OverLoCK-T at 224²."""
    batch = 128 if session.full else 4
    torch.manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape)).to(device=session.device, dtype=session.dtype)

    for channels, side in ((64, 56), (256, 14)):
        groups, reduced = channels // 16, channels // 4
        x = draw(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        features = draw(batch, reduced, side, side).contiguous(memory_format=torch.channels_last)
        weight, bias = draw(49 * groups, reduced, scale=reduced**-0.5), draw(49 * groups)
        yield Fusion(
            "involution2d_generate",
            f"{channels}@{side}² K=7",
            lambda x=x, f=features, w=weight, b=bias, g=groups: kernels.involution2d_generate(
                x, f, w, b, kernel_size=7, groups=g
            ),
            lambda x=x, f=features, w=weight, b=bias, g=groups: kernels.involution2d(
                x, F.conv2d(f, w[:, :, None, None], b).unflatten(1, (g, 7, 7))
            ),
            _bytes(x, features, weight, bias, x),
        )
    for heads, side, size in ((8, 14, 13), (16, 7, 7)):
        shape = f"{heads}×16@{side}²"
        logits, value = draw(batch, heads, side, side, size**2), draw(batch, heads, side, side, 16)
        rpb = draw(heads, 2 * size - 1, 2 * size - 1)

        def chain(logits: Tensor = logits, value: Tensor = value, rpb: Tensor = rpb, size: int = size) -> Tensor:
            bias = rpb_logits(rpb, logits.shape[2], logits.shape[3], Window.neighborhood((size, size)))
            return kernels.na2d_av((logits + bias).softmax(-1), value, size)

        yield Fusion(
            "na2d_softmax_av",
            f"{shape} K={size}",
            lambda a=logits, v=value, r=rpb, k=size: kernels.na2d_softmax_av(a, v, k, rpb=r),
            chain,
            _bytes(logits, value, rpb, value),
        )
        workload = workloads.contmix("", batch, heads, 16, (side, side), (5, size))
        inputs = workload.draw_inputs(session.dtype, session.device)
        yield Fusion(
            "contmix2d",
            f"{shape} K=5,{size}",
            lambda i=inputs, w=workload: w.forward(i)[0],
            lambda i=inputs, sizes=(5, size): contmix_chain(**i, kernel_sizes=sizes),
            workload.floor_bytes(session.dtype),
        )


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@torch.no_grad()
def measure_fusion(session: Session, ceilings: Ceilings) -> dict[str, list[plots.Comparison]]:
    """ "time" in ms and "memory" in MB of every pair, after both were found to compute the same."""
    found: dict[str, list[plots.Comparison]] = {"time": [], "memory": []}
    for pair in fusions(session):
        calls = {"fused": pair.fused, "unfused": pair.unfused}
        # Each rounds once more than it would in float32, which is what the bound is made for.
        check(largest_error([pair.fused()], [pair.unfused()]), 4 * tolerances.GRADIENT[session.dtype], pair.name)
        times = timing.measure(calls, session.device, seconds=0.5 if session.full else 0.1, min_runs=3)
        floor = 1000 * pair.floor_bytes / ceilings.bytes_per_second
        found["time"].append(
            plots.Comparison(pair.name, pair.shape, times["fused"].p50_ms, times["unfused"].p50_ms, floor)
        )
        peaks = [timing.peak_memory(call, session.device) for call in calls.values()]
        if None not in peaks:
            megabytes = [peak / 1e6 for peak in peaks if peak is not None]
            found["memory"].append(plots.Comparison(pair.name, pair.shape, *megabytes))
    for name in found:
        found[name].sort(key=lambda line: line.group)
    return found


def fusion_figure(found: dict[str, list[plots.Comparison]], session: Session) -> Figure:
    """How far the fused operator lies left of the chain is what fusing saves."""
    panels = [
        (heading, quantity, found[heading])
        for heading, quantity in (("time", "time of a call, ms"), ("memory", "peak memory beyond the inputs, MB"))
        if found[heading]
    ]
    return plots.comparison_figure(
        panels, title="Fused (ours) against unfused, forward", contender="unfused chain", device=session.label
    )
