"""Notebook 03: models against their naive path and their peers, and where their time goes, by torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import kernels
from autotune import plots, report, workloads
from autotune.comparison import Settings, inference_pass, measure_model, on_backend, time_and_memory
from autotune.notebooks.session import Session, finish, grid, record_label

__all__ = [
    "CATEGORIES",
    "Breakdown",
    "breakdown",
    "breakdown_figure",
    "committed_figure",
    "from_record",
    "measure_models",
    "measure_peers",
    "models_figure",
    "peers",
    "setting",
]

SMALL = {"rednet26": "RedNet-26", "volo_d1": "VOLO-D1", "overlock_xt": "OverLoCK-XT"}
FULL = {"rednet50": "RedNet-50", "volo_d1": "VOLO-D1", "overlock_t": "OverLoCK-T"}


def titles(session: Session) -> dict[str, str]:
    """Model name -> title: each family's smallest, or on a GPU the ones that the papers compare."""
    return FULL if session.full else SMALL


def image_size(session: Session) -> tuple[int, int]:
    """224², and a third as many pixels where there is no GPU."""
    return (224, 224) if session.full else (128, 128)


@dataclass(frozen=True)
class Measured:
    """One contender: seconds for a batch, and peak bytes beyond weights and images."""

    model: str
    contender: str
    batch: int
    seconds: float
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds


def _settings(session: Session) -> Settings:
    batch, seconds = (128, 2.0) if session.full else (1, 0.3)
    return Settings(session.device, session.dtype, batch=batch, seconds=seconds, min_runs=3)


def measure_models(session: Session, *, training: bool = False) -> list[Measured]:
    """Each family on our path and on the naive one, on the photograph; both agree before either is timed."""
    settings, photo = _settings(session), workloads.photograph()
    found = []
    for name, title in titles(session).items():
        row = measure_model(name, image_size(session), photo, settings, training=training)
        for path in ("ours", "naive"):
            seconds = row[path]["p50_ms"] / 1000
            found.append(Measured(title, path, settings.batch, seconds, row[path]["peak_bytes"]))
    return found


def peers() -> dict[str, Callable[[], nn.Module] | None]:
    """What the models are compared with elsewhere: name -> a constructor, None where its library is not installed."""
    return {"ResNet-50 (torchvision)": _torchvision("resnet50"), "VOLO-D1 (timm)": _timm("volo_d1_224")}


def _torchvision(name: str) -> Callable[[], nn.Module] | None:
    try:
        import torchvision  # pyright: ignore[reportMissingImports]
    except Exception:  # built for another torch it raises RuntimeError
        return None
    return lambda: torchvision.models.get_model(name, weights=None)


def _timm(name: str) -> Callable[[], nn.Module] | None:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except Exception:  # as torchvision, which it imports
        return None
    return lambda: timm.create_model(name, pretrained=False)


def measure_peers(session: Session) -> tuple[list[Measured], list[str]]:
    """The peers that are installed, measured as the models are, inference only; and the names of the others."""
    settings = _settings(session)
    images = workloads.image_batch(
        workloads.photograph(), image_size(session), settings.batch, session.dtype, session.device
    )
    found, missing = [], []
    for name, build in peers().items():
        if build is None:
            missing.append(name)
            continue
        model = build().eval().to(device=session.device, dtype=session.dtype)
        call = inference_pass(model, images)
        peer = time_and_memory({name: call}, session.device, settings.seconds, settings.min_runs)[name]
        found.append(Measured(name, "peer", settings.batch, peer["p50_ms"] / 1000, peer["peak_bytes"]))
    return found, missing


def from_record(record: Mapping[str, Any]) -> list[Measured]:
    """The inference rows of a committed models.json: what was not compiled, and the peers."""
    found = []
    for row in record["rows"]:
        if row["status"] != "ok" or row["pass"] != "inference":
            continue
        for name, timed in row["contenders"].items():
            if name in plots.MARKERS and name != "compiled":
                label = row["peer"] if name == "peer" else row["model"]
                found.append(Measured(label, name, row["batch"], timed["p50_ms"] / 1000, timed["peak_bytes"]))
    return found


def committed_figure(record: Mapping[str, Any]) -> Figure | None:
    """The figure of a committed models.json; None where it holds no model."""
    measured = from_record(record)
    return models_figure(measured, record_label(record)) if measured else None


def setting(session: Session, missing: Sequence[str]) -> str:
    """What a figure says of the images, and of the peers that are not there."""
    height, width = image_size(session)
    absent = f" · not installed here: {', '.join(missing)}" if missing else ""
    return f"{height}×{width} pixels, random weights{absent} · {session.label}"


def models_figure(measured: Sequence[Measured], label: str) -> Figure:
    """Throughput and peak memory; a row for each model, a point for each contender."""
    rows = list(dict.fromkeys(entry.model for entry in measured))
    with plots.style():
        figure, axes = grid(1, 2, 11, 1.9 + 0.55 * len(rows), sharey=True)
        quantities = (
            ("throughput, images/s  (more is better)", 1, lambda entry: entry.images_per_second),
            ("peak memory of a batch, MB  (less is better)", -1, lambda entry: _megabytes(entry.peak_bytes)),
        )
        for axis, (heading, better, quantity) in zip(axes[0], quantities, strict=True):
            for row, model in enumerate(rows):
                values = {entry.contender: quantity(entry) for entry in measured if entry.model == model}
                axis.hlines(
                    row, min(values.values()), max(values.values()), color=plots.COLOURS["guide"], linewidth=2.5
                )
                for name, value in values.items():
                    axis.plot(value, row, plots.MARKERS[name], color=plots.COLOURS[name], markersize=9)
                if {"ours", "naive"} <= set(values):
                    ratio = (values["ours"] / values["naive"]) ** better  # below 1 where ours is behind
                    axis.annotate(
                        f"{ratio:.1f}×", (max(values.values()), row), (9, 0), textcoords="offset points", va="center",
                        fontweight="bold",
                    )  # fmt: skip
            axis.set(xscale="log", xlabel=heading)
            axis.grid(axis="x")
            least, most = axis.get_xlim()
            axis.set_xlim(least / 1.1, most * 1.5)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axes[0][0].set_yticks(range(len(rows)), rows)
        axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
        names = {"ours": "ours", "naive": "the same model, naive path", "peer": "peer"}
        used = dict.fromkeys(entry.contender for entry in measured)
        handles = [
            axes[0][0].plot([], [], plots.MARKERS[name], color=plots.COLOURS[name], label=names[name])[0]
            for name in used
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
        return finish(figure, "Models, inference", f"batch {measured[0].batch} · {label}")


def _megabytes(number: int | None) -> float:
    return float("nan") if number is None else number / 1e6


# Category -> colour, words; an operation belongs to the first whose words occur in its name.
CATEGORIES = {
    "dynamic kernels": ("#0072B2", ()),
    "large depthwise": ("#56B4E9", ()),
    "other convolutions, matrix products": ("#E69F00", ("conv", "mm", "linear", "gemm", "attention", "dot_product")),
    "normalisation": ("#009E73", ("norm",)),
    "copies, layout": ("#CC79A7", ("copy", "clone", "contiguous", "cat", "empty", "to_copy", "fill", "zero", "pad")),
    "element-wise, pooling, rest": ("#B8B8B8", ()),
}
RANGE = "kernels."


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one image by category, on one path of one model."""

    model: str
    path: str
    milliseconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


@contextmanager
def _named_ranges() -> Iterator[None]:
    """Every call of a public operator becomes a range of the profiler, so that both paths' time is told apart alike."""
    originals = {
        name: function for name in kernels.__all__ if callable(function := getattr(kernels, name)) and "2d" in name
    }

    def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with record_function(RANGE + name):
                return function(*arguments, **options)

        return call

    for name, function in originals.items():
        setattr(kernels, name, ranged(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


def category_of(name: str, ancestors: Sequence[str]) -> str:
    """The category of an operation, from its name and those of the ranges and operations it runs inside."""
    for ancestor in (name, *ancestors):
        if ancestor.startswith(RANGE):
            return "large depthwise" if "depthwise" in ancestor else "dynamic kernels"
    lowered = name.lower()
    for category, (_, words) in CATEGORIES.items():
        if any(word in lowered for word in words):
            return category
    return "element-wise, pooling, rest"


def breakdown(model: nn.Module, title: str, images: Tensor, backend: str, *, runs: int = 2) -> Breakdown:
    """Where the time of inference goes: self time of every operation (of its kernels, on a GPU), the mean over runs."""
    on_gpu = images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    call = on_backend(backend, inference_pass(model, images))
    call()
    with _named_ranges(), profile(activities=activities) as recorded:
        for _ in range(runs):
            call()
    microseconds = dict.fromkeys(CATEGORIES, 0.0)
    for event in recorded.events() or ():
        if event.device_type.name != "CPU":  # a kernel's own entry: its time counts for the operation that launched it
            continue
        own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        microseconds[category_of(event.name, list(_ancestors(event)))] += own
    count = runs * len(images)
    return Breakdown(
        title,
        "naive" if backend == "reference" else "ours",
        {name: value / 1000 / count for name, value in microseconds.items()},
    )


def _ancestors(event: Any) -> Iterator[str]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent.name
        parent = parent.cpu_parent


def breakdowns(session: Session) -> list[Breakdown]:
    """Every family on both paths."""
    batch, runs = (32, 5) if session.full else (1, 2)
    photo = workloads.photograph()
    images = workloads.image_batch(photo, image_size(session), batch, session.dtype, session.device)
    found = []
    for name, title in titles(session).items():
        model = workloads.photograph_model(name, photo).to(device=session.device, dtype=session.dtype)
        found += [breakdown(model, title, images, backend, runs=runs) for backend in ("auto", "reference")]
    return found


def breakdown_figure(found: Sequence[Breakdown], session: Session) -> Figure:
    """A bar for each path of each model, in parts."""
    with plots.style():
        figure, axes = grid(1, 1, 12, 1.4 + 0.45 * len(found))
        axis = axes[0][0]
        for row, entry in enumerate(found):
            left = 0.0
            for name, (colour, _) in CATEGORIES.items():
                value = entry.milliseconds[name]
                axis.barh(row, value, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.8)
                if value > 0.07 * max(other.total for other in found):
                    axis.text(
                        left + value / 2, row, f"{value / entry.total:.0%}", ha="center", va="center", fontsize=10
                    )
                left += value
            axis.text(left, row, f"  {report.number(entry.total)} ms", va="center", fontsize=10, fontweight="bold")
        axis.set_yticks(range(len(found)), [f"{entry.model}, {entry.path}" for entry in found])
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.set_xlim(right=1.1 * max(entry.total for entry in found))
        axis.set_xlabel("time of an image, ms  (less is better)")
        handles = [axis.barh(0, 0, color=colour, label=name) for name, (colour, _) in CATEGORIES.items()]
        figure.legend(handles=handles, loc="outside right center")
        return finish(figure, "Where the time goes (torch.profiler, inference)", setting(session, ()))
