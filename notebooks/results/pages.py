"""What the pages show of a GPU: tables, sentences and figures from its folder of notebooks/results alone."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from matplotlib.figure import Figure

from autotune import plots, report, results
from autotune.passes import PASSES
from autotune.results import OTHERS, Row, gpu_milliseconds
from autotune.tables import Table, microseconds, number, times
from notebooks.results.folder import Folder, listed

HOST_BOUND = 2.0  # a call that takes this many times as long as its work on the GPU waits for the host
PREDICTED_FOR = "NVIDIA_H200"


# ---- what was measured where, operators, models


def _machine(folder: Folder) -> Iterator[str]:
    machine, ceilings = folder.environment["machine"], results.ceilings_told(folder.environment["ceilings"])
    yield (
        f"**{machine['device']}**, driver {machine['driver']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"commit {machine['commit'][:12]}, {machine['date'][:10]}. On it {ceilings}"
    )


def _reached(folder: Folder) -> Iterator[str]:
    """What there was time for."""
    parts = [
        f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows of {what}"
        for what, rows in (("operators", folder.operators), ("models", folder.models))
    ]
    missed = f"; it had no time to compare {folder.unreached} with anything" if folder.unreached else ""
    yield f"The run measured {listed(parts)}{missed}."
    if any("commit" in row for row in folder.operators):
        yield "A row that names a commit beside its shape was measured at that one, the others at the one above."
    for run in folder.test_runs:
        counts = run["counts"]
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if name in counts)
        at = f"{run['of']} at commit {run['commit'][:7]}" if "of" in run else "the tests"
        yield f"Of {at} {told}{'' if run['complete'] else ' before their time was over'}."
    summary = f"{folder.path.name}/summary.md"
    yield f"[{summary}]({summary}) names every row and test that was skipped or failed."


def _operators(folder: Folder) -> Iterator[str]:
    """The table, and below it which calls wait for the host rather than for the GPU."""
    yield results.operators_table(folder.operators, folder.beside).markdown() + "\n"
    for kind in PASSES:
        rows, found = folder.timed(kind), dict[str, list[str]]()
        for row in rows:
            device = 1000 * row["graph"]["ours"]["p50_ms"] if "graph" in row else folder.beside(row)
            if device and 1000 * row["contenders"]["ours"]["p50_ms"] >= HOST_BOUND * device:
                found.setdefault(f"`{row['operator']}`", []).append(row["shape"])
        if found:
            told = "; ".join(f"{operator} {listed(shapes)}" for operator, shapes in found.items())
            yield (
                f"The host bounds {sum(map(len, found.values()))} of {len(rows)} eager {kind} calls, which take at "
                f"least {HOST_BOUND:g} times as long as their work on the GPU: {told}."
            )


def _models(folder: Folder) -> Iterator[str]:
    yield results.models_table(folder.models).markdown()


def _host(folder: Folder) -> Iterator[str]:
    """A line for every run that timed a launch."""
    rows = []
    for record in (folder.load("ncu.json"), folder.environment):
        if found := record.get("launch_microseconds"):
            columns = [f"{found[name]:.0f}" for name in ("direct", "configured", "tuned", "operator")]
            rows.append([record["machine"]["date"][:16].replace("T", " "), *columns])
    headings = ["run", "Triton's own launch", "our launcher, config given", "config looked up", "operator's call"]
    yield Table(headings, rows).markdown()


# ---- the README


def _readme(folder: Folder) -> Iterator[str]:
    """The first shape of each operator, which has its largest map; the range over all; each model."""
    forward, both = (folder.timed(kind) for kind in PASSES)
    first: dict[str, Row] = {}
    for row in forward:
        first.setdefault(row["operator"], row)
    rows = []
    for row in first.values():
        trained = next((r for r in both if r["name"] == row["name"]), {})
        ratios = [[times(r.get("speed_up", {}).get(n)) for n in OTHERS[:2]] for r in (row, trained)]
        where = [f"`{row['operator']}`", f"{row['model']} {row['shape']}", microseconds(gpu_milliseconds(row, "ours"))]
        rows.append([*where, *ratios[0], number(gpu_milliseconds(trained, "ours") if trained else None), *ratios[1]])
    of = "GPU" if any("graph" in row for row in both) else "call"
    headings = ["operator", "shape", "forward, GPU, µs", "naive", "compiled", f"forward+backward, {of}, ms"]
    yield Table([*headings, "naive", "compiled"], rows, 2).markdown()
    machine = folder.load("bench.json")["machine"]
    yield (
        f"\n*{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date'][:10]}; "
        "bfloat16, batch 128: each operator's largest map. naive, compiled: how many times as long the form that "
        "unfolds takes, eagerly and compiled by PyTorch.*\n"
    )
    ranges = []
    for kind, timed in zip(PASSES, (forward, both), strict=True):
        ratios = {name: [r["speed_up"][name] for r in timed if name in r["speed_up"]] for name in OTHERS[:2]}
        told = [f"{number(min(v))} to {number(max(v))} times ({name})" for name, v in ratios.items() if v]
        ranges += [f"{kind} {listed(told)}"] if told else []
    measured = len(forward) + len(both)
    yield f"Over all {measured} rows that there was time for (of {len(folder.operators)}): {', '.join(ranges)}."
    if folder.unreached:
        yield f"There was no time to compare {folder.unreached} with anything."
    yield "\n" + _models_beside_peers(folder).markdown()
    yield (
        "\n*Models at batch 128: images per second compiled by PyTorch, ours and a peer's of as many operations; their "
        "ratio, and that of the times for which the GPU was busy; last, our kernels over the naive path, both eager.*"
    )


def _models_beside_peers(folder: Folder) -> Table:
    """A line for each model and pass that was timed, first those that were compiled."""
    rows = []
    for row in sorted(folder.models, key=lambda row: "compiled" not in row.get("contenders", ())):
        if row["status"] != "ok":
            continue
        ours, peer = (row["contenders"].get(name, {}) for name in ("compiled", "peer_compiled"))
        speeds = [f"{found['images_per_second']:,.0f}" if found else "–" for found in (ours, peer)]
        ratio = row["speed_up"].get("peer_compiled") if ours and peer else None
        busy = peer["busy_ms"] / ours["busy_ms"] if ours.get("busy_ms") and peer.get("busy_ms") else None
        beside = f"{speeds[1]} (`{row['peer']}`)" if peer else speeds[1]
        ratios = [times(value) for value in (ratio, busy, row["speed_up"].get("naive"))]
        rows.append([f"`{row['name']}`", row["pass"], speeds[0], beside, *ratios])
    headings = ["model", "pass", "ours, images/s", "peer, images/s", "ours / peer", "by GPU time"]
    return Table([*headings, "ours / naive, eager"], rows, 2)


# ---- single kernels: predicted beside measured


def _predicted(records: Sequence[Row], folder: Folder | None) -> str:
    """A line for each case and pass: floor, what is predicted for each Triton, and what was measured."""
    columns = [{(row["case"], row["pass"]): row["microseconds"] for row in record["rows"]} for record in records]
    rows, ratios = [], []
    for row in records[0]["rows"] if records else []:
        key = row["case"], row["pass"]
        own, everything = (folder.microseconds(*key, own=own) if folder else None for own in (True, False))
        then = folder.predicted(*key) if folder else None
        ratio = own / then if own and then else None
        ratios += [] if ratio is None else [ratio]
        predicted = [number(row["floor_microseconds"]), *(number(column.get(key)) for column in columns)]
        measured = [number(own), number(ratio), number(everything)]
        rows.append([*key, row["bound_by"].replace("_kernel", ""), str(row["launches"]), *predicted, *measured])
    headings = ["case", "pass", "predicted bound", "launches", "floor, µs"]
    headings += [f"predicted, Triton {record['triton']}, µs" for record in records]
    headings += ["measured, our kernels, µs", "measured / predicted then", "measured, everything, µs"]
    table = Table(headings, rows, 3).markdown()
    if not ratios:
        return table
    usual = sum(1.35 <= ratio < 2.05 for ratio in ratios)
    return (
        f"Our kernels took {min(ratios):.2f} to {max(ratios):.2f} times as long as predicted, "
        f"{statistics.median(ratios):.2f} times in the median; {usual} of the {len(ratios)} factors lie between 1.35 "
        f"and 2.05.\n\n{table}"
    )


def _unpredicted(records: Sequence[Row], folder: Folder) -> str:
    """A line for each case that was measured and has no prediction."""
    predicted = {row["case"] for record in records for row in record["rows"]}
    rows = []
    for case in dict.fromkeys(case for case, _ in folder.launched if case not in predicted):
        found = [folder.microseconds(case, k, own=own) for k in ("forward", "backward") for own in (True, False)]
        rows.append([case, *map(number, found)])
    headings = ["case", "forward, our kernels, µs", "everything", "backward, our kernels, µs", "everything"]
    return Table(headings, rows).markdown()


# ---- what a page is made of


def _joined(measured: Sequence[Folder], *makers: Callable[[Folder], Iterable[str]]) -> str:
    """What every maker tells of every folder, with an empty line between."""
    return "\n\n".join("\n".join(make(folder)) for folder in measured for make in makers)


def readme(measured: Sequence[Folder]) -> str:
    return _joined(measured, _readme)


def sections(measured: Sequence[Folder]) -> dict[str, str]:
    """Section of the page of results -> its text."""
    return {
        "gpu": _joined(measured, _machine, _reached),
        "gpu operators": _joined(measured, _operators),
        "gpu models": _joined(measured, _models),
        "gpu host": _joined(measured, _host),
    }


def prediction_sections(measured: Sequence[Folder], predicted: Sequence[Row]) -> dict[str, str]:
    """Section of the page of predictions -> its text."""
    same = next((folder for folder in measured if folder.path.name == PREDICTED_FOR), None)
    return {
        "predicted": _predicted(predicted, same),
        "gpu kernels": _unpredicted(predicted, same) if same else "",
    }


def figures(folder: Folder, predicted: Sequence[Row]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure, and the fingerprint of the records that it shows."""
    drawn: dict[str, tuple[Figure, str]] = {}
    machine = folder.environment["machine"]
    device = f"{machine['device']} · bfloat16 · batch 128 · {machine['date'][:10]}"
    rows = [row for row in folder.timed(PASSES[0]) if {"ours", "naive"} <= set(row.get("graph", {}))]
    if rows:
        order = list(dict.fromkeys(row["operator"] for row in rows))
        lines = [_comparison(row) for row in sorted(rows, key=lambda row: order.index(row["operator"]))]
        panels = [("forward, and the gain over the nearest other", "time on the GPU, µs", lines)]
        figure = plots.comparison_figure(panels, title="Operators on a GPU", device=device)
        drawn["operators.png"] = figure, report.fingerprint(folder.load("bench.json"))
    kinds = ("forward", "backward")
    panels = [(kind, "time of our kernels, µs", _beside(folder, predicted[0], kind)) for kind in kinds if predicted]
    if any(panel[2] for panel in panels):
        figure = plots.comparison_figure(
            panels, title="Predicted and measured", ours="predicted", contender="measured", device=device
        )
        drawn["predicted.png"] = figure, report.fingerprint({"measured": folder.kernels, "predicted": predicted[0]})
    return drawn


def _comparison(row: Row) -> plots.Comparison:
    found = {name: 1000 * times["p50_ms"] for name, times in row["graph"].items()}
    label, floor = f"{row['model']} {row['shape']}", 1000 * row["floor"]["ms"]
    return plots.Comparison(row["operator"], label, found["ours"], found["naive"], floor, found.get("compiled"))


def _beside(folder: Folder, record: Row, kind: str) -> list[plots.Comparison]:
    """A line for each case of which both passes were predicted, as the code was when it was measured."""
    lines = []
    for row in record["rows"]:
        time, then = folder.microseconds(row["case"], kind, own=True), folder.predicted(row["case"], kind)
        both = all(folder.predicted(row["case"], other) for other in ("forward", "backward"))
        if row["pass"] == kind and time and then and both:
            operator, _, shape = row["case"].partition(".")
            lines.append(plots.Comparison(operator, shape, then, time, floor=row["floor_microseconds"]))
    return lines
