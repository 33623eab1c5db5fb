"""What ``autotune.compare`` found, as a table for a notebook or a terminal, a figure, JSON, or a DataFrame."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from autotune import plots
from autotune.passes import PASSES
from autotune.tables import Found, Table, megabytes, number, percent, spread, times

NAIVE = "naive"  # the row of the naive path


@dataclass(frozen=True, repr=False)
class Contest(Found):
    """What ``compare`` found; a notebook shows it as a table, and so do ``print`` and ``rich``.

    A row of ``rows`` has a ``name``, a ``kind`` (one of the colours of ``plots``) and a ``status``: ``ok``, with times
    in milliseconds, ``peak_bytes``, ``speed_up`` over ``baseline``, ``of_floor`` and ``relative_error`` (None where
    nothing was compared), or ``left out`` with a ``message``. ``floor_ms`` is the time in which a copy moves
    ``floor_bytes``: each input, weight and output once. ``operations`` counts what PyTorch's counter knows.
    """

    title: str
    backward: bool
    baseline: str
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
        return f"{self.title}, {PASSES[self.backward]}, {self.dtype}"

    def table(self) -> Table:
        """The notes say what the columns mean, who was left out and why, and what speaks against the times."""
        cells = []
        for row in self.rows:
            if row["status"] != "ok":
                cells.append([row["name"], "left out"])
                continue
            name = row["name"] if row["relative_error"] is not None else f"{row['name']} (not compared)"
            ratios = [times(row["speed_up"]), megabytes(row["peak_bytes"]), percent(row["of_floor"])]
            cells.append([name, number(row["p50_ms"]), spread(row), *ratios])
        notes = [
            f"speed-up: over {self.baseline}. peak: the most that a call holds at once, beyond its inputs and weights.",
            f"of floor: {self.floor_ms:.3g} ms, in which a copy moves each input, weight and output once per pass.",
            *(f"{row['name']} was left out: {row['message']}" for row in self.rows if row["status"] != "ok"),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        headings = ["", "median, ms", "p20 to p80", "speed-up", "peak, MB", "of floor"]
        return Table(headings, cells, 1, f"{self.heading} · {self.machine['device']}", notes)

    def plot(self) -> Figure:
        """Medians with their spread beside the floor, and peak memory."""
        rows = self.timed
        with plots.style():
            panels = 1 if None in [row["peak_bytes"] for row in rows] else 2
            figure, (axes,) = plots.grid(1, panels, 4.5 + 3 * panels, 1.8 + 0.45 * len(rows))
            for position, row in enumerate(rows):
                around = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
                colour = plots.COLOURS[row["kind"]]
                axes[0].barh(position, row["p50_ms"], xerr=around, height=0.6, color=colour, capsize=3)
                if panels == 2:
                    axes[1].barh(position, row["peak_bytes"] / 1e6, height=0.6, color=colour)
                    axes[1].set_xlabel("peak memory, MB  (less is better)")
            label = f"floor: {self.floor_ms:.2g} ms, a copy as large"
            axes[0].axvline(self.floor_ms, color=plots.COLOURS["floor"], linestyle="--", label=label)
            axes[0].set_xlabel("time of a call, ms; p20 to p80  (less is better)")
            figure.legend(loc="outside lower left")
            for axis in axes:
                names = [row["name"] if axis is axes[0] else "" for row in rows]
                axis.set_yticks(range(len(rows)), names)
                axis.set_ylim(len(rows) - 0.5, -0.5)
                axis.grid(axis="x")
            return plots.finish(figure, self.heading, self.machine["device"])
