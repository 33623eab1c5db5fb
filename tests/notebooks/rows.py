"""Rows of results that are easy to follow by hand."""

from typing import Any


def operator_row(kind: str, contenders: dict, graph: dict | None = None, **changes: Any) -> dict[str, Any]:
    """A row of bench.json, of na2d_av at 14², whose floor is 10 µs; ``contenders`` are milliseconds."""
    compared = graph or contenders
    ours = compared["ours"]
    row = {"name": "na2d_av M 14", "operator": "na2d_av", "model": "M", "shape": "8×16@14² K=13", "batch": 128}
    row |= {"pass": kind, "status": "ok", "floor": {"ms": 0.01, "fraction": 0.01 / ours}}
    row["speed_up"] = {name: time / ours for name, time in compared.items() if name != "ours"}
    for field, times in {"contenders": contenders, "graph": graph}.items():
        row |= {field: {name: {"p50_ms": time} for name, time in times.items()}} if times else {}
    return row | changes


def model_row(**paths: tuple[float, int]) -> dict[str, Any]:
    """A row of models.json; each path has images per second and peak bytes."""
    contenders = {name: {"images_per_second": speed, "peak_bytes": peak} for name, (speed, peak) in paths.items()}
    row = {"name": "net", "size": [224, 192], "batch": 64, "pass": "inference", "status": "ok"}
    return row | {"contenders": contenders, "speed_up": {"naive": 3.0008}}
