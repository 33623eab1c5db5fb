"""What the pages show is what the committed results hold; `make figures` writes it."""

import re

import pytest
from PIL import Image

from autotune import report
from autotune.results import OTHERS
from notebooks.results import figures, pages
from notebooks.results.folder import folders


def test_the_pages_are_up_to_date():
    for page, content in figures.sections().items():
        text = page.read_text()
        assert figures.updated(text, content) == text, f"{page}: run `make figures`"
    with pytest.raises(ValueError, match="section 'models' once, found 0 times"):
        figures.updated("no markers", {"models": "table"})


def shown_numbers(figure):
    """What a figure of the pages was drawn from."""
    if figure.name == "predicted.png":
        return {"measured": figures.load(figure.with_name("kernels.json")), "predicted": figures.predictions()[0]}
    return figures.load(figure.with_name("bench.json" if figure.name == "operators.png" else "profile.json"))


def test_every_figure_of_the_pages_shows_the_committed_numbers():
    drawn = 0
    for page in figures.sections():
        for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            path = page.parent / figure
            if path.name == "windows.png":  # shows no numbers
                assert path.exists()
                continue
            with Image.open(path) as picture:
                assert picture.info["Source"] == report.fingerprint(shown_numbers(path)), (
                    f"{figure}: run `make figures`"
                )
            drawn += 1
    assert drawn >= 5


@pytest.mark.parametrize("name", figures.published())
def test_counts_are_the_committed_and_the_published_ones(name):
    """Multiply-adds to 5 %, parameters to the last digit that the paper has."""
    published, counted = figures.published()[name].published, figures.count_model(name)
    assert counted == pytest.approx(figures.load(figures.RESULTS / "models.json")[name])
    digits = len(f"{published.parameters_m:g}".partition(".")[2])
    assert counted["parameters_m"] == pytest.approx(published.parameters_m, abs=0.5 * 10**-digits)
    if published.multiply_adds_g is not None:
        assert counted["multiply_adds_g"] == pytest.approx(published.multiply_adds_g, rel=0.05)


@pytest.fixture
def folder():
    return next(found for found in folders(figures.RESULTS) if found.path.name == pages.PREDICTED_FOR)


def numbers(cell):
    """4000 and 80 in "4,000 (80.0×)"; percentages as shares."""
    shares = {"%": 0.01}
    found = re.findall(r"([\d.]+)(%?)", cell.replace(",", ""))
    return [float(number) * shares.get(unit, 1) for number, unit in found]


def lines(folder, section):
    """The cells of a section's table, by heading."""
    text = (pages.sections([folder]) | pages.prediction_sections([folder], figures.predictions()))[section]
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(table[0], cells, strict=True)) for cells in table[1:]]


def test_operators_have_the_times_and_ratios_of_their_rows(folder):
    """Those of graphs where a call was captured in one, and like compared with like."""
    shown = lines(folder, "gpu operators")
    assert len(shown) == len(folder.timed()) > 20
    for row, line in zip(folder.timed(), shown, strict=True):
        assert line["operator"].strip("`") == row["operator"]
        assert line["shape"].startswith(f"{row['model']} {row['shape']}")
        times = {name: 1000 * found["p50_ms"] for name, found in row.get("graph", row["contenders"]).items()}
        ours, floor = times["ours"], 1000 * row["floor"]["ms"]
        expected = {f"{name}, µs": [times[name], times[name] / ours] if name in times else [] for name in OTHERS}
        expected |= {"GPU, µs": [ours] if "graph" in row else [], "floor, µs": [floor], "of floor": [floor / ours]}
        expected["call, µs"] = [1000 * row["contenders"]["ours"]["p50_ms"]]
        for column, found in expected.items():
            assert numbers(line[column]) == pytest.approx(found, rel=0.01, abs=0.006), column


def test_the_readme_compares_compiled_models_with_their_peers(folder):
    """Those that were compiled come first."""
    timed = [row for row in folder.models if row["status"] == "ok"]
    timed.sort(key=lambda row: "compiled" not in row["contenders"])
    table = pages._models_beside_peers(folder)
    assert [row[:2] for row in table.rows] == [[f"`{row['name']}`", row["pass"]] for row in timed]
    for row, cells in zip(timed, table.rows, strict=True):
        ours, peer = (row["contenders"].get(name) for name in ("compiled", "peer_compiled"))
        expected = [[], [], [], []]
        if ours:
            ratios = [[peer[time] / ours[time]] for time in ("p50_ms", "busy_ms")]
            expected = [[ours["images_per_second"]], [peer["images_per_second"]], *ratios]
        for cell, found in zip(cells[2:], expected, strict=False):
            assert numbers(cell.partition(" ")[0]) == pytest.approx(found, rel=0.01)
        eager = [row["contenders"][name]["p50_ms"] for name in ("naive", "ours")]
        assert numbers(cells[6]) == pytest.approx([eager[0] / eager[1]], rel=0.01)


def test_kernels_are_told_beside_their_predictions(folder):
    for line in lines(folder, "predicted"):
        launched = folder.launched.get((line["case"], line["pass"]), [])
        ours = sum(k["microseconds"] for k in launched if not re.search("::|xmma|nvjet|cutlass|Mem", k["kernel"]))
        then = folder.predicted(line["case"], line["pass"])
        assert numbers(line["measured, our kernels, µs"]) == ([pytest.approx(ours, rel=0.01)] if ours else [])
        ratio = [pytest.approx(ours / then, rel=0.01)] if ours and then else []
        assert numbers(line["measured / predicted then"]) == ratio
    assert "times as long" not in pages.prediction_sections([], figures.predictions())["predicted"], (
        "nothing was measured there"
    )


def test_an_operator_that_the_pages_do_not_know_is_told_of(folder):
    row = next(row for row in folder.timed("forward") if row["operator"] == "na2d_av")
    folder.operators.append(row | {"operator": "newest", "name": "newest"})
    assert folder.beside(folder.operators[-1]) is None
    assert "| `newest` |" in pages.sections([folder])["gpu operators"]


def test_what_was_not_measured_is_not_told(folder):
    folder.operators = [row | {"status": "skipped"} for row in folder.operators]
    folder.launched.clear()
    assert pages.figures(folder, figures.predictions()) == {}
    assert "The host bounds" not in pages.sections([folder])["gpu operators"]
    assert "Over all 0 rows that there was time for (of 76)" in pages.readme([folder])


def test_tuned_configs_beside_the_heuristics():
    def entry(heuristic, tuned):
        return {"config": {"rows": 4, "num_warps": 2}, "heuristic_milliseconds": heuristic, "milliseconds": tuned}

    entries = {"sum rows=7 dtype=bfloat16": entry(0.03, 0.02), "sum rows=14 dtype=bfloat16": entry(0.05, 0.05)}
    text = figures._tuned_table({"gpu": "G", "entries": entries | {"mix rows=7 dtype=bfloat16": entry(0.04, 0.02)}})
    for line in (
        "G: 3 problems; tuning gains 1.50× in the median and 2.00× at most, and keeps the heuristic's config in 1.",
        "| `sum` | rows=7 | rows=4 num_warps=2 | 30.0 | 20.0 | 1.50× |",
        "| `mix` | rows=7 dtype=bfloat16 | rows=4 num_warps=2 | 40.0 | 20.0 | 2.00× |",
    ):
        assert line in text


def test_figures_show_every_contender_and_name_their_numbers(folder):
    drawn = pages.figures(folder, figures.predictions())
    legends = {file: [text.get_text() for text in figure.legends[0].texts] for file, (figure, _) in drawn.items()}
    assert legends == {
        "operators.png": ["memory floor", "ours", "naive", "naive, compiled"],
        "predicted.png": ["memory floor", "predicted", "measured"],
    }
    figure, source = drawn["operators.png"]
    assert source == report.fingerprint(folder.load("bench.json"))
    row = next(row for row in folder.timed("forward") if row["operator"] == "na2d_av")
    nearest = min(time["p50_ms"] for name, time in row["graph"].items() if name in ("naive", "compiled"))
    assert f"{nearest / row['graph']['ours']['p50_ms']:.0f}×" in [text.get_text() for text in figure.axes[0].texts]
