"""``python -m autotune profile``: what it measures, what it refuses to measure, and what it leaves behind."""

import argparse
import functools
import json
import subprocess
import sys

import pytest
import torch
from matplotlib.text import Text
from rich.console import Console

import kernels
from autotune import operators, profile, report, timing, workloads
from autotune.__main__ import COMMANDS, main
from autotune.tables import number
from tests.support import DEVICE

INVOLUTION = "involution2d RedNet-50 512@7"
OUTLOOK = "outlook_attention2d"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Runs ``profile --quick`` into a fresh folder: its exit code and the record it wrote."""
    # Two runs say nothing about a speed anyway.
    monkeypatch.setattr(timing, "copy_bandwidth", functools.partial(timing.copy_bandwidth, size=2**20))

    def run(*arguments):
        code = main(["profile", "--quick", "--out", str(tmp_path), *arguments])
        return code, json.loads((tmp_path / "profile.json").read_text())

    return run


def test_rows_tell_everything_about_a_measurement(quick, tmp_path, capsys):
    code, record = quick("--only", INVOLUTION, "--dtype", "float32")
    assert code == 0
    assert record["complete"] is True
    assert record["machine"]["device_type"] == DEVICE
    assert record["machine"]["torch"] == torch.__version__
    assert record["settings"]["weights"] == "random"
    (row,) = record["rows"]
    assert (row["kind"], row["operator"], row["pass"], row["status"]) == ("operator", "involution2d", "forward", "ok")
    assert 0 <= row["relative_error"] <= row["tolerance"] == 1e-5
    for path in ("ours", "naive"):
        assert 0 < row[path]["p20_ms"] <= row[path]["p50_ms"] <= row[path]["p80_ms"]
        assert row[path]["runs"] >= 2
        assert row[path]["peak_bytes"] >= 4 * 512 * 49  # the output at least
    assert row["naive"]["peak_bytes"] >= 4 * 512 * 49 * 49, "the unfolded features"
    assert row["speed_up"] == row["naive"]["p50_ms"] / row["ours"]["p50_ms"]
    floor = row["floor"]
    assert floor["bytes"] == 4 * (512 * 49 + 32 * 49 * 49 + 512 * 49)
    assert floor["ms"] == pytest.approx(floor["bytes"] / record["copy_gigabytes_per_second"] / 1e6)
    assert floor["fraction"] == pytest.approx(floor["ms"] / row["ours"]["p50_ms"])

    for name in ("profile_operators.png", "profile_memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "profile_models.png").exists()
    shown = capsys.readouterr()
    assert "[1/1] involution2d RedNet-50 512@7² K=7 forward" in shown.err
    for text in ("involution2d", "512@7² K=7", number(row["speed_up"]) + "×", f"Wrote {tmp_path}"):
        assert text in shown.out
    assert "Models:" not in shown.out


def test_a_model_runs_on_the_photograph(quick, tmp_path):
    code, record = quick("--only", "rednet26", "--sizes", "64x48", "--training", "--batch", "2")
    assert code == 0, record["rows"]
    assert [(row["name"], row["pass"], row["status"]) for row in record["rows"]] == [
        ("rednet26 64×48", "forward", "ok"),
        ("rednet26 64×48", "forward+backward", "ok"),
    ]
    forward, both = record["rows"]
    assert forward["images_per_second"] == pytest.approx(2000 / forward["ours"]["p50_ms"])
    assert both["ours"]["peak_bytes"] > forward["ours"]["peak_bytes"]
    assert forward["tolerance"] < both["tolerance"]
    assert (tmp_path / "profile_models.png").read_bytes().startswith(b"\x89PNG")


def test_a_naive_path_that_fails_costs_its_line(quick, monkeypatch, capsys):
    correct, calls = kernels.reference.involution2d, []

    def once(*inputs, **options):  # for the check alone
        calls.append(inputs)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("too large")
        return correct(*inputs, **options)

    monkeypatch.setattr(kernels.reference, "involution2d", once)
    code, record = quick("--only", INVOLUTION, OUTLOOK)
    assert code == 1
    assert record["rows"][0]["message"] == "RuntimeError: the naive path: OutOfMemoryError: too large"
    assert not {"ours", "naive", "speed_up", "floor"} & set(record["rows"][0])
    assert record["rows"][1]["status"] == "ok"
    assert "failed" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_done(quick, monkeypatch, tmp_path):
    measure = operators.measure_operator

    def interrupted(workload, *arguments, **options):
        if workload.operator == OUTLOOK:
            raise KeyboardInterrupt
        return measure(workload, *arguments, **options)

    monkeypatch.setattr(operators, "measure_operator", interrupted)
    code, record = quick("--only", INVOLUTION, OUTLOOK)
    assert code == 130
    assert record["complete"] is False
    assert [row["operator"] for row in record["rows"]] == ["involution2d"]
    assert (tmp_path / "profile_operators.png").exists()


@pytest.mark.parametrize("name", workloads.OPERATORS)
def test_a_name_means_that_operator_alone(name):
    found = profile._workloads(argparse.Namespace(shape=None, operator=[name]), 1)
    assert {workload.operator for workload in found} == {name}


def test_an_operator_at_a_shape_of_ones_own(quick):
    arguments = ("--operator", "involution2d", "--shape", "2x32x8x6", "--kernel-size", "3", "--dtype", "fp32")
    code, record = quick(*arguments)
    assert code == 0
    assert [(row["name"], row["pass"]) for row in record["rows"]] == [("involution2d 32@8×6 K=3", "forward")]
    assert record["settings"]["batch"] == 2
    assert record["rows"][0]["floor"]["bytes"] == 4 * 2 * (2 * 32 + 2 * 9) * 8 * 6
    code, record = quick("--operator", OUTLOOK, "--model", "rednet26", "--size", "32x64", "--backward")
    assert [(row["name"], row["pass"]) for row in record["rows"]] == [
        (name, kind)
        for name in (f"{OUTLOOK} VOLO-D1 6×32@28² K=3 s=2", "rednet26 32×64")
        for kind in ("forward", "forward+backward")
    ]


def test_a_module_of_the_users(quick, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_nets.py").write_text(
        "from torch import nn\nfrom models.rednet import Involution2d\n\n\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 16, 1), Involution2d(16, 3), nn.BatchNorm2d(16))\n\n\n"
        "def needs(argument): ...\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, record = quick("--module", "toy_nets:net", "--input", "2x3x8x8", "--training")
    assert code == 0, record["rows"]
    assert [(row["name"], row["pass"]) for row in record["rows"]] == [
        ("Sequential 2×3×8×8", "forward"),
        ("Sequential 2×3×8×8", "forward+backward"),
    ]
    assert "Models: random inputs, the module's own weights." in capsys.readouterr().out
    for name, message in (
        ("toy_nets", "must be PACKAGE.MODULE:NAME"),
        ("no_such_nets:Net", "No module named 'no_such_nets'"),
        ("toy_nets:Net", "has no attribute 'Net'"),
        ("toy_nets:needs", "missing 1 required positional argument"),
        ("toy_nets:number", "'int' object is not callable"),
    ):
        with pytest.raises(SystemExit):
            main(["profile", "--quick", "--module", name])
        assert message in capsys.readouterr().err


def test_against_an_earlier_run(quick, tmp_path, capsys):
    only = ("--only", INVOLUTION, OUTLOOK)
    _, record = quick(*only)
    earlier = tmp_path / "earlier.json"
    for row, factor in zip(record["rows"], (0.01, 100), strict=True):
        row["ours"] |= {name: factor * row["ours"][name] for name in ("p20_ms", "p50_ms", "p80_ms")}
    earlier.write_text(json.dumps(record))
    code, record = quick(*only, "--against", str(earlier))
    assert code == 1
    assert [row["verdict"] for row in record["against"]["rows"]] == ["slower", "faster"]
    shown = capsys.readouterr().out
    assert "slower" in shown
    assert "p20 to p80" in shown
    assert quick("--only", OUTLOOK, "--against", str(earlier))[0] == 0, "nothing became slower"
    assert quick(*only, "--against", str(earlier), "--threshold", "1e6")[0] == 0


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "16"], "--sizes: must be SIDE or HEIGHTxWIDTH, at least 32 pixels each, got '16'"),
        (["--sizes", "64x64x64"], "--sizes: must be SIDE or HEIGHTxWIDTH"),
        (["--shape", "1x16x8x8"], "--shape must be BATCHxCHANNELSxHEIGHTxWIDTH, of an --operator"),
        (["--operator", "na2d_av", "--shape", "1x16x8"], "--shape must be BATCHxCHANNELSxHEIGHTxWIDTH"),
        (["--operator", "na2d_av", "--shape", "1x16x0x8"], "--shape: must be an integer of at least 1, got '0'"),
        (["--operator", "na2d_av", "--shape", "1x16x8x8", "--kernel-size", "4"], "kernel_size must be odd"),
        (["--operator", "na2d_av", "--shape", "1x20x8x8"], "channels must be a multiple of 16"),
        (["--operator", "na2d_av", "--shape", "2x16x8x8", "--batch", "3"], "--batch, --shape and --input must have"),
        (["--operator", "nothing"], "--operator must match a name"),
        (["--kernel-size", "3"], "--kernel-size must come with --shape"),
        (["--input", "1x3x8x8"], "--input must come with --module"),
        (["--model", "nothing"], "--model must be a name"),
        (["--against", "missing.json"], "--against must be a profile.json that can be read"),
        (["--threshold", "0"], "--threshold: must be a finite number above 0"),
        (["--backend", "magic"], "--backend: invalid choice: 'magic'"),
        (["--only", "involution2d", "nothing"], "--only must match a name, 'nothing' does not; names begin with"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    try:
        code = main(["profile", "--quick", "--out", str(tmp_path / "new"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_the_interpreter_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["profile", "--quick", "--backend", "triton", "--out", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["only", "operator", "model", "module", "against", "quick", None])
def test_a_part_never_replaces_the_whole(what, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "repository_root", lambda: tmp_path)
    given = dict.fromkeys(("out", "only", "operator", "model", "module", "against", "quick"))
    found = profile._out_folder(argparse.Namespace(**given | ({what: "given"} if what else {})), torch.device("cpu"))
    folder = timing.device_folder(torch.device("cpu"))
    assert found == tmp_path / ("build" if what else "notebooks") / "results" / folder


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


def test_what_speaks_against_the_times_is_said(capsys):
    steady, restless = ({"p20_ms": 1.9, "p50_ms": 2.0, "p80_ms": p80, "peak_bytes": 1} for p80 in (2.2, 2.4))
    record = record_of([row("a", ours=steady, naive=steady), row("b", ours=restless, naive=steady)])
    record |= {"other_cores": 1.5, "seconds": 3}
    assert report.warnings(record) == [
        "the machine is busy: other processes take 1.5 of its 4 cores",
        "1 of 2 lines vary by more than 20% of their median (p20 to p80)",
    ]
    report.show(record, Console(highlight=False))
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


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom autotune.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_command.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "toy", ("toy_command", "what this machine cannot run"))
    assert main(["toy"]) == 2
    assert "toy needs the package no_such_package, which is not installed here" in capsys.readouterr().err
