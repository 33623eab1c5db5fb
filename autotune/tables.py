"""Numbers and tables as people read them: a table is described once, for terminals, notebooks and pages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console, Group
from rich.measure import Measurement
from rich.text import Text

from kernels.files import write_json

WIDEST = 180  # characters of a table in a terminal
COLOURS = {"failed": "red", "slower": "red", "none": "red", "skipped": "yellow", "unchecked": "yellow", "not": "yellow"}
COLOURS |= {"faster": "green", "used": "green", "ok": "green"}


def number(value: float | None) -> str:
    """Three digits that matter; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{number(ratio)}×"


def percent(fraction: float) -> str:
    """Whole per cents, and below one of them two more digits."""
    return f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.2%}"


def microseconds(milliseconds: float | None) -> str:
    value = None if milliseconds is None else 1000 * milliseconds
    return f"{value:,.0f}" if value and value >= 1000 else number(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """As in "rows=4 num_warps=2"."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def megabytes(count: int | None) -> str:
    return number(None if count is None else count / 1e6)


def spread(found: Mapping[str, Any]) -> str:
    """The range from p20 to p80 in milliseconds."""
    return f"{number(found['p20_ms'])} to {number(found['p80_ms'])}" if "p20_ms" in found else ""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first ``words`` columns hold words, the others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    title: str = ""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table alone, for a page that has its own title and notes."""
        width = len(self.headings)
        lines = [f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in (self.headings, *self.rows)]
        lines.insert(1, f"|{'---|' * self.words}{'---:|' * (width - self.words)}")
        return "\n".join(lines)

    def html(self) -> str:
        """What a notebook shows: the title above, the first column to the left, notes below."""
        lines = []
        for first, *others in self.rows:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
            lines.append(f'<tr><th style="text-align:left">{escape(first)}</th>{cells}</tr>')
        heading = "".join(f"<th>{escape(text)}</th>" for text in self.headings)
        caption = f'<caption style="text-align:left"><b>{escape(self.title)}</b></caption>'
        notes = f"<small>{'<br>'.join(map(escape, self.notes))}</small>"
        return f"<table>{caption}<thead><tr>{heading}</tr></thead><tbody>{''.join(lines)}</tbody></table>{notes}"

    def __rich__(self) -> Group:
        shown = rich.table.Table(title=Text(self.title), title_justify="left")
        for index, heading in enumerate(self.headings):
            if index < self.words:
                shown.add_column(Text(heading), overflow="fold")
            else:
                shown.add_column(Text(heading), justify="right", no_wrap=True)
        for row in self.rows:
            cells = (cell.replace("`", "") for cell in row)
            shown.add_row(*(Text(cell, COLOURS.get(cell.partition(" ")[0].rstrip(":"), "")) for cell in cells))
        return Group(shown, *map(Text, self.notes))

    def show(self) -> None:
        """Print it. Where the terminal is too narrow, wrapped lines lose less than columns cut short."""
        console = Console(highlight=False)
        natural = Measurement.get(console, console.options.update(width=1000), self.__rich__().renderables[0]).maximum
        console.width = max(console.width, min(natural, WIDEST))
        console.print(self)


@dataclass(frozen=True, repr=False)
class Found:
    """What a measurement found: a table in a notebook and for ``print`` and ``rich``, JSON, or a DataFrame."""

    rows: list[dict[str, Any]]

    def table(self) -> Table:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.table().html()

    def __rich__(self) -> Group:
        return self.table().__rich__()

    def __repr__(self) -> str:
        console = Console(width=120, color_system=None, highlight=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON, written to a file as well where ``path`` names one."""
        if path is not None:
            write_json(Path(path), asdict(self))
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """The rows as a DataFrame. ImportError, saying what to install, where pandas is missing."""
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError:
            message = "to_pandas needs the package pandas, which is not installed here: pip install pandas"
            raise ImportError(message) from None
        return pandas.DataFrame(self.rows)
