"""What ``autotune.compare`` found, as a table for a notebook or a terminal, a figure, JSON, or a DataFrame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.markup import escape as escape_markup
from rich.table import Table
from rich.text import Text

from autotune import plots, report, timing

__all__ = ["NAIVE", "Contest", "data_frame", "html_table"]

NAIVE = "naive"  # the row of the naive path
HEADINGS = ("", "median, ms", "p20 to p80", "speed-up", "peak, MB", "of floor", "device")


@dataclass(frozen=True)
class Contest:
    """What ``compare`` found; a notebook shows it as a table, and so do ``print`` and ``rich``.

    A row of ``rows`` has a ``name``, a ``kind`` (one of the colours of ``plots``) and a ``status``: ``ok``, with times
    in milliseconds, ``peak_bytes``, ``speed_up`` over ``baseline``, ``of_floor`` and ``relative_error`` (None where
    nothing was compared), or ``left out`` with a ``message``. ``floor_ms`` is the time in which a copy moves
    ``floor_bytes``: each input, weight and output once. ``operations`` counts what PyTorch's counter knows.
    """

    title: str
    backward: bool
    baseline: str
    rows: list[dict[str, Any]]
    floor_bytes: int
    floor_ms: float
    operations: int
    tolerance: float
    dtype: str
    machine: dict[str, Any]
    warnings: list[str]

    @property
    def device(self) -> str:
        return self.machine["device_type"]

    @property
    def threads(self) -> int:
        """CPU threads that PyTorch used."""
        return self.machine["cpu_threads"]

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The rows that were timed."""
        return [row for row in self.rows if row["status"] == "ok"]

    def row(self, name: str) -> dict[str, Any]:
        """KeyError where there is no such row."""
        return {row["name"]: row for row in self.rows}[name]

    @property
    def heading(self) -> str:
        return f"{self.title}, {'forward+backward' if self.backward else 'forward'}, {self.dtype}"

    @property
    def notes(self) -> list[str]:
        """What the columns mean, which contenders were left out and why, and what speaks against the times."""
        return [
            f"speed-up: over {self.baseline}. peak: the most that a call holds at once, beyond its inputs and weights.",
            f"of floor: {self.floor_ms:.3g} ms, in which a copy moves each input, weight and output once per pass.",
            *(f"{row['name']} was left out: {row['message']}" for row in self.rows if row["status"] != "ok"),
            *(f"warning: {warning}" for warning in self.warnings),
        ]

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            if row["status"] != "ok":
                yield row["name"], "left out", "", "", "", "", ""
                continue
            peak = row["peak_bytes"]
            name = row["name"] if row["relative_error"] is not None else f"{row['name']} (not compared)"
            yield (
                name,
                report.number(row["p50_ms"]),
                f"{report.number(row['p20_ms'])} to {report.number(row['p80_ms'])}",
                f"{report.number(row['speed_up'])}×",
                report.number(None if peak is None else peak / 1e6),
                report.percent(row["of_floor"]),
                self.machine["device"],
            )

    def _repr_html_(self) -> str:
        return html_table(self.heading, HEADINGS, self._cells(), self.notes)

    def __rich__(self) -> Group:
        found = Table(
            title=escape_markup(f"{self.heading} · {self.machine['device']}"),
            title_justify="left",
        )
        for number, text in enumerate(HEADINGS[:-1]):
            found.add_column(text, justify="right" if number else "left")
        for name, *cells in self._cells():
            found.add_row(*map(escape_markup, (name, *cells[:-1])))
        return Group(found, *map(Text, self.notes))

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, highlight=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    __repr__ = __str__

    def plot(self) -> Figure:
        """Medians with their spread beside the floor, and peak memory."""
        rows = self.timed
        peaks = [row["peak_bytes"] for row in rows]
        positions = range(len(rows))
        with plots.style():
            panels = 1 if None in peaks else 2
            figure, axes = plots.new_figure(4.5 + 3 * panels, 1.8 + 0.45 * len(rows), panels)
            for position, row in zip(positions, rows, strict=True):
                around = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
                colour = plots.COLOURS[row["kind"]]
                axes[0].barh(position, row["p50_ms"], xerr=around, height=0.6, color=colour, capsize=3)
                if panels == 2:
                    axes[1].barh(position, row["peak_bytes"] / 1e6, height=0.6, color=colour)
            axes[0].axvline(
                self.floor_ms,
                color=plots.COLOURS["floor"],
                linestyle="--",
                label=f"floor: {self.floor_ms:.2g} ms, a copy as large",
            )
            axes[0].set_xlabel("time of a call, ms; p20 to p80  (less is better)")
            figure.legend(loc="outside lower left")
            if panels == 2:
                axes[1].set_xlabel("peak memory, MB  (less is better)")
            for axis in axes:
                axis.set_yticks(positions, [row["name"] for row in rows] if axis is axes[0] else [""] * len(rows))
                axis.set_ylim(len(rows) - 0.5, -0.5)
                axis.grid(axis="x")
            plots.describe(figure, self.heading, self.machine["device"])
        return figure

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON, written to a file as well where ``path`` names one."""
        if path is not None:
            timing.write_json(Path(path), asdict(self))
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """The rows as a DataFrame. ImportError where pandas is not installed."""
        return data_frame(self.rows)


def html_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str]) -> str:
    """What a notebook shows: a title above, the first column to the left, notes below."""
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th style="text-align:left">{escape(first)}</th>{cells}</tr>')
    heading = "".join(f"<th>{escape(text)}</th>" for text in headings)
    return (
        f'<table><caption style="text-align:left"><b>{escape(title)}</b></caption><thead><tr>{heading}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table><small>{'<br>'.join(map(escape, notes))}</small>"
    )


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas DataFrame. ImportError, saying what to install, where pandas is missing."""
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            "to_pandas needs the package pandas, which is not installed here: pip install pandas"
        ) from None
    return pandas.DataFrame(rows)
