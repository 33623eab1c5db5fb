"""What ``python -m autotune profile`` makes of its rows: verdicts against an earlier run, figures, warnings."""

import json

import pytest
from matplotlib.text import Text

from autotune import report


def record_of(rows):
    settings = {"dtype": "float32", "batch": 4, "image": "a photograph", "weights": "random", "implementation": "eager"}
    machine = {"device": "Analytical Engine", "cpu_count": 4}
    record = {"rows": rows, "machine": machine, "settings": settings, "other_cores": 0.1}
    return record | {"copy_gigabytes_per_second": 10.0}


def row(name, what="forward", **changes):
    ours = {"p20_ms": 1.9, "p50_ms": 2.0, "p80_ms": 2.1, "peak_bytes": 3_000_000}
    naive = {"p20_ms": 7.9, "p50_ms": 8.0, "p80_ms": 8.1, "peak_bytes": 24_000_000}
    found = {"kind": "operator", "name": name, "operator": name, "model": "Model", "shape": "8@8²", "pass": what}
    found |= {"status": "ok", "ours": ours, "naive": naive, "speed_up": 4.0, "floor": {"ms": 1.0, "fraction": 0.5}}
    return found | changes


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ((1.9, 2.0, 2.1), "same"),
        ((2.3, 2.4, 2.5), "slower"),
        ((2.05, 2.4, 2.5), "same"),  # the ranges overlap
        ((2.15, 2.19, 2.3), "same"),  # within the threshold
        ((1.5, 1.6, 1.7), "faster"),
        ((1.5, 1.6, 1.95), "same"),
    ],
)
def test_a_change_counts_beyond_threshold_and_spread(now, verdict):
    times = dict(zip(("p20_ms", "p50_ms", "p80_ms"), now, strict=True))
    before = {"p20_ms": 1.9, "p50_ms": 2.0, "p80_ms": 2.1}
    (found,) = report.differences([row("a", ours=times)], {"a forward": row("a", ours=before)}, 0.1)
    assert found["verdict"] == verdict
    assert found["change"] == pytest.approx(now[1] / 2 - 1)
    assert found["control"] == 0
    assert report.differences([row("b", ours=times)], {"a forward": row("a", ours=before)}, 0.1) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["machine"].update(device="Abacus"), "device was Abacus, and is Analytical Engine here"),
        (lambda record: record["settings"].update(batch=64), "batch was 64, and is 4 here"),
        (lambda record: record["settings"].update(dtype="float16"), "dtype was float16"),
        (lambda record: record["rows"][0].update(name="another"), "must hold a line that this run measures"),
        (lambda record: record.pop("settings"), "must be a profile.json that can be read"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, change, message):
    earlier = record_of([row("a")])
    change(earlier)
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match=message):
        report.earlier_rows(tmp_path / "earlier.json", record_of([row("a")]), ["a forward"])


def test_figures_name_the_device_their_units_and_the_ratio():
    drawn = report.figures(record_of([row("a"), row("b"), row("a", "forward+backward"), row("b", "forward+backward")]))
    assert set(drawn) == {"profile_operators.png", "profile_memory.png"}
    for file, ratio, unit in (("profile_operators.png", "4.0×", "ms"), ("profile_memory.png", "8.0×", "MB")):
        texts = [text.get_text() for text in drawn[file].findobj(Text)]
        assert "Analytical Engine · float32 · batch 4" in texts
        assert texts.count(ratio) == 4
        assert sum(f", {unit}" in text for text in texts) == 2
    model = report.figures(record_of([row("a", kind="model")]))["profile_models.png"]
    assert "Models: a photograph, random weights" in [text.get_text() for text in model.findobj(Text)]


def test_every_line_stands_below_the_heading_of_its_group():
    drawn = report.figures(record_of([row("a"), row("b"), row("a", shape="4@4²") | {"name": "a 4@4²"}]))
    headings = [text.get_text() for text in drawn["profile_operators.png"].findobj(Text)]
    assert [text for text in headings if text in ("a", "b")] == ["a", "b", "a"]


def test_a_busy_machine_and_restless_times_are_warned_of(capsys):
    steady, restless = ({"p20_ms": 1.9, "p50_ms": 2.0, "p80_ms": p80, "peak_bytes": 1} for p80 in (2.2, 2.4))
    record = record_of([row("a", ours=steady, naive=steady), row("b", ours=restless, naive=steady)])
    record |= {"other_cores": 1.5, "seconds": 3}
    assert report.warnings(record) == [
        "the machine is busy: other processes take 1.5 of its 4 cores",
        "1 of 2 lines vary by more than 20% of their median (p20 to p80)",
    ]
    report.show(record)
    shown = capsys.readouterr().out
    for text in ("1.90 to 2.20", "1.90 to 2.40", "warning: the machine is busy", "warning: 1 of 2 lines"):
        assert text in shown
    assert report.warnings(record_of([row("a")])) == []


def test_figures_show_only_what_was_measured():
    failed = {key: value for key, value in row("b").items() if key not in ("ours", "naive", "speed_up", "floor")}
    rows = [row("a"), failed | {"status": "failed", "message": "it broke"}]
    (texts,) = (
        {text.get_text() for text in figure.findobj(Text)}
        for file, figure in report.figures(record_of(rows)).items()
        if file == "profile_operators.png"
    )
    assert "a" in texts
    assert "b" not in texts
    unknown = row("a")["ours"] | {"peak_bytes": None}
    assert set(report.figures(record_of([row("a", ours=unknown, naive=unknown)]))) == {"profile_operators.png"}
    assert report.figures(record_of([rows[1]])) == {}
