"""``python -m autotune profile``: what it measures, what it refuses to measure, and what it leaves behind."""

import argparse
import functools
import json
from unittest import mock

import pytest
import torch
from PIL import Image

from autotune import operators, profile, timing, workloads
from autotune.__main__ import main
from autotune.passes import PASSES
from autotune.tables import number
from models._contract import IMAGENET_MEAN, IMAGENET_STD
from tests.support import DEVICE

INVOLUTION = "involution2d RedNet-50 512@7"
OUTLOOK = "outlook_attention2d"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Runs ``profile --quick`` into a fresh folder: its exit code and the record it wrote."""
    # Two runs say nothing about a speed, so that a small copy will do.
    monkeypatch.setattr(timing, "copy_bandwidth", functools.partial(timing.copy_bandwidth, size=2**20))

    def run(*arguments):
        code = main(["profile", "--quick", "--out", str(tmp_path), *arguments])
        return code, json.loads((tmp_path / "profile.json").read_text())

    return run


def test_rows_tell_everything_about_a_measurement(quick, tmp_path, capsys):
    code, record = quick("--operator", INVOLUTION, "--dtype", "float32")
    assert (code, record["complete"]) == (0, True)
    assert (record["machine"]["device_type"], record["machine"]["torch"]) == (DEVICE, torch.__version__)
    assert record["settings"]["weights"] == "random"
    assert record["other_cores"] is None or record["other_cores"] >= 0
    (row,) = record["rows"]
    assert (row["kind"], row["operator"], row["pass"], row["status"]) == ("operator", "involution2d", "forward", "ok")
    assert 0 <= row["relative_error"] <= row["tolerance"] == 1e-5
    assert row["ours"]["peak_bytes"] >= 4 * 512 * 49, "the output at least"
    assert row["naive"]["peak_bytes"] >= 4 * 512 * 49 * 49, "the unfolded features"
    assert row["speed_up"] == row["naive"]["p50_ms"] / row["ours"]["p50_ms"]
    assert row["floor"]["bytes"] == 4 * (512 * 49 + 32 * 49 * 49 + 512 * 49)
    assert row["floor"]["ms"] == pytest.approx(row["floor"]["bytes"] / record["copy_gigabytes_per_second"] / 1e6)

    for name in ("profile_operators.png", "profile_memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "profile_models.png").exists()
    shown = capsys.readouterr()
    assert "[1/1] involution2d RedNet-50 512@7² K=7 forward" in shown.err
    for text in ("involution2d", "512@7² K=7", number(row["speed_up"]) + "×", f"Wrote {tmp_path}"):
        assert text in shown.out
    assert "Models:" not in shown.out


def test_a_model_runs_on_the_photograph(quick, tmp_path, monkeypatch):
    photo, measured = tmp_path / "red.png", mock.Mock(wraps=profile.measure_model)
    Image.new("RGB", (80, 60), (255, 0, 0)).save(photo)
    monkeypatch.setattr(profile, "measure_model", measured)
    chosen = ("--model", "tiny_rednet", "--operator", OUTLOOK, "--image", str(photo))
    code, record = quick(*chosen, "--size", "64x48", "--backward", "--batch", "2")
    assert code == 0, record["rows"]
    assert record["settings"]["image"] == "red.png"
    red = torch.tensor((1 - IMAGENET_MEAN[0]) / IMAGENET_STD[0])
    torch.testing.assert_close(measured.call_args.args[1][1, 0].cpu(), red.expand(64, 48))
    assert [(row["name"], row["pass"], row["status"]) for row in record["rows"]] == [
        (name, kind, "ok") for name in (f"{OUTLOOK} VOLO-D1 6×32@28² K=3 s=2", "tiny_rednet 64×48") for kind in PASSES
    ]
    forward, both = record["rows"][2:]
    assert forward["images_per_second"] == pytest.approx(2000 / forward["ours"]["p50_ms"])
    assert both["ours"]["peak_bytes"] > forward["ours"]["peak_bytes"]
    assert forward["tolerance"] < both["tolerance"]
    assert (tmp_path / "profile_models.png").read_bytes().startswith(b"\x89PNG")


def test_a_naive_path_that_fails_costs_its_line(quick, monkeypatch, capsys):
    def measured(*_, **__):
        return {"left_out": {"naive": "OutOfMemoryError: too large"}}

    monkeypatch.setattr(operators, "measure_operator", measured)
    code, record = quick("--operator", INVOLUTION)
    assert code == 1
    assert record["rows"][0]["message"] == "RuntimeError: the naive path: OutOfMemoryError: too large"
    assert "failed" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_done(quick, monkeypatch, tmp_path):
    measure = operators.measure_operator

    def interrupted(workload, *arguments, **options):
        if workload.operator == OUTLOOK:
            raise KeyboardInterrupt
        return measure(workload, *arguments, **options)

    monkeypatch.setattr(operators, "measure_operator", interrupted)
    code, record = quick("--operator", INVOLUTION, OUTLOOK)
    assert code == 130
    assert record["complete"] is False
    assert [row["operator"] for row in record["rows"]] == ["involution2d"]
    assert (tmp_path / "profile_operators.png").exists()


@pytest.mark.parametrize("name", workloads.OPERATORS)
def test_a_name_means_that_operator_alone(name):
    found = profile._workloads(argparse.Namespace(shape=None, operator=[name]), 1)
    assert {workload.operator for workload in found} == {name}


def test_a_module_of_the_users(quick, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_nets.py").write_text(
        "from torch import nn\nfrom models.rednet import Involution2d\n\n\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 16, 1), Involution2d(16, 3), nn.BatchNorm2d(16))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, record = quick("--module", "toy_nets:net", "--input", "2x3x8x8", "--training")
    assert code == 0, record["rows"]
    assert [(row["name"], row["pass"]) for row in record["rows"]] == [("Sequential 2×3×8×8", kind) for kind in PASSES]
    assert "Models: random inputs, the module's own weights." in capsys.readouterr().out
    assert quick("--module", "toy_nets:net", "--input", "2x3x8x8", "--model", "rednet26", "--sizes", "32")[0] == 0
    told = (
        "Models: matplotlib's portrait of Grace Hopper (--module: random inputs), random (--module: the module's own) w"
    )
    assert told in capsys.readouterr().out


def test_operators_at_a_shape_of_ones_own_against_an_earlier_run(quick, tmp_path, capsys):
    operators = ("--operator", "involution2d", OUTLOOK, "--shape", "2x32x8x6", "--kernel-size", "3", "--dtype", "fp32")
    _, record = quick(*operators)
    assert [(row["name"], row["pass"]) for row in record["rows"]] == [
        (f"{name} K=3{stride}", "forward")
        for name, stride in (("involution2d 32@8×6", ""), (f"{OUTLOOK} 1×32@8×6", " s=2"))
    ]
    assert record["settings"]["batch"] == 2
    assert record["rows"][0]["floor"]["bytes"] == 4 * 2 * (2 * 32 + 2 * 9) * 8 * 6
    earlier = tmp_path / "earlier.json"
    for row, factor in zip(record["rows"], (0.01, 100), strict=True):
        row["ours"] |= {name: factor * row["ours"][name] for name in ("p20_ms", "p50_ms", "p80_ms")}
    earlier.write_text(json.dumps(record))
    code, record = quick(*operators, "--against", str(earlier))
    assert code == 1
    assert [row["verdict"] for row in record["against"]["rows"]] == ["slower", "faster"]
    shown = capsys.readouterr().out
    assert "slower" in shown
    assert "p20 to p80" in shown
    code, record = quick(*operators, "--against", str(earlier), "--threshold", "1e6", "--json")
    assert code == 0, "nothing became so much slower"
    assert json.loads(capsys.readouterr().out) == record
