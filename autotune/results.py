"""Tables and sentences of rows that ``bench`` measured, those of bench.json (operators) and of models.json."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from autotune.tables import Table, microseconds, number, percent, times

Row = dict[str, Any]
OTHERS = ("naive", "compiled", "unfused")
BUSY = ("ours", "compiled", "peer_compiled")  # contenders whose time on the GPU alone is told


def gpu_milliseconds(row: Row, contender: str) -> float | None:
    """A contender's time: in a CUDA graph where the row has one, as the row's speed-ups compare them."""
    return row.get("graph", row["contenders"]).get(contender, {}).get("p50_ms")


def ceilings_told(found: dict[str, float]) -> str:
    copy, bf16, fp32 = (
        found[name] / 1e12
        for name in ("copy_bytes_per_second", "bf16_operations_per_second", "fp32_operations_per_second")
    )
    return (
        f"a copy moves {copy:.2f} TB/s, a bfloat16 matrix product reaches {bf16:.0f} TFLOP/s and float32 arithmetic "
        f"{fp32:.1f} TFLOP/s."
    )


def _of_commit(row: Row) -> str:
    """Where a row was measured at another commit than the file's."""
    return f" ({row['commit'][:7]})" if "commit" in row else ""


def operators_table(measured: Iterable[Row], kernels: Callable[[Row], float | None] | None = None) -> Table:
    """Medians of calls, of their work on the GPU alone, and of the others.

    The GPU's work is timed in a CUDA graph; ``kernels`` gives the sum of the kernels of a row, each timed by itself.
    """
    rows = []
    for row in measured:
        if row["status"] != "ok":
            continue
        graph, eager = row.get("graph", {}).get("ours", {}).get("p50_ms"), row["contenders"]["ours"]["p50_ms"]
        shape = f"{row['model']} {row['shape']}{_of_commit(row)}".strip()
        cells = [f"`{row['operator']}`", shape, row["pass"], microseconds(graph)]
        cells += [] if kernels is None else [number(kernels(row))]
        cells += [microseconds(eager), microseconds(row["floor"]["ms"]), percent(row["floor"]["fraction"])]
        for name in OTHERS:
            time = gpu_milliseconds(row, name)
            cells.append("–" if time is None else f"{microseconds(time)} ({times(row['speed_up'][name])})")
        rows.append(cells)
    headings = ["operator", "shape", "pass", "GPU, µs", *([] if kernels is None else ["kernels, µs"]), "call, µs"]
    return Table([*headings, "floor, µs", "of floor", *(f"{name}, µs" for name in OTHERS)], rows, 3, "Operators")


def models_table(measured: Iterable[Row]) -> Table:
    found = [row for row in measured if row["status"] == "ok"]
    names = ("ours", "naive", "compiled", "peer", "peer_compiled")
    paths = [name for name in names if any(name in row["contenders"] for row in found)]
    timed = [name for name in BUSY if any(row["contenders"].get(name, {}).get("busy_ms") for row in found)]
    rows = []
    for row in found:
        speeds = [row["contenders"].get(name, {}).get("images_per_second") for name in paths]
        naive, ours = (row["contenders"].get(name, {}).get("peak_bytes") for name in ("naive", "ours"))
        beside = f" beside {row['peer']}" if row.get("peer") else ""
        cells = [f"`{row['name']}`{beside}{_of_commit(row)}", "×".join(map(str, row["size"]))]
        cells += [row["pass"], str(row["batch"]), *("–" if speed is None else f"{speed:,.0f}" for speed in speeds)]
        cells += [number(row["contenders"].get(name, {}).get("busy_ms")) for name in timed]
        rows.append([*cells, times(row["speed_up"].get("naive")), times(naive / ours if naive and ours else None)])
    headings = ["model", "size", "pass", "batch", *(f"{name.replace('_', ' ')}, images/s" for name in paths)]
    headings += [f"GPU busy, {name.replace('_', ' ')}, ms" for name in timed]
    return Table([*headings, "speed-up", "peak memory, naive / ours"], rows, 3, "Models")


def tables(operators: Iterable[Row], models: Iterable[Row]) -> Iterator[Table]:
    """The operators and the models, where any was measured."""
    yield from (table for table in (operators_table(operators), models_table(models)) if table.rows)


def incidents(rows: Iterable[Row]) -> Iterator[str]:
    """What failed, was skipped or left out, and why."""
    for row in rows:
        if row["status"] != "ok":
            yield f"{row['status']}: {row['name']} {row['pass']}: {row.get('message', '')}"
        for name, reason in row.get("left_out", {}).items():
            yield f"left out: {row['name']} {row['pass']}, {name}: {reason}"
