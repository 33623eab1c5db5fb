"""``python -m autotune bench``: rows that are checked before they are timed, and survive what happens around them."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernels
from autotune import bench, bench_operators, timing, workloads
from autotune.__main__ import main
from autotune.bench_models import ModelBench, Plan
from autotune.bench_operators import OperatorBench, benchmark_workloads, naive_bytes
from autotune.cases import LOST, Case, TimeLimitError, run_cases, time_limit
from autotune.comparison import DisagreementError
from tests.support import DEVICE

HERE = torch.device(DEVICE)
CEILINGS = {
    "copy_bytes_per_second": 1e9,
    "bf16_operations_per_second": 1e12,
    "fp32_operations_per_second": 1e11,
}
OPERATORS = OperatorBench(HERE, torch.float32, CEILINGS, compiler="eager", seconds=0.001, min_runs=2)
TINY = {workload.operator: workload for workload in benchmark_workloads(quick=True)}


def _case(name, measure):
    return Case({"name": name, "pass": "forward"}, measure)


def _run(path, cases, deadline=math.inf, resume=False):
    record = {"machine": {"device_type": "cpu"}}
    code = run_cases(cases, path / "rows.json", record, deadline=deadline, resume=resume)
    written = json.loads((path / "rows.json").read_text())
    assert written["rows"] == record["rows"]
    return code, {row["name"]: row for row in written["rows"]}


def test_every_row_is_on_disk_before_the_next_begins(tmp_path):
    def second():
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert [(row["name"], row["status"]) for row in rows] == [("first", "ok"), ("second", "running")]
        raise ValueError("no such shape\nsecond line")

    code, rows = _run(
        tmp_path, [_case("first", lambda: {"speed_up": 2}), _case("second", second), _case("third", dict)]
    )
    assert code == 1
    assert rows["first"]["speed_up"] == 2
    assert rows["second"]["message"] == "ValueError: no such shape"
    assert "second line" in rows["second"]["traceback"]
    assert rows["third"]["status"] == "ok"


def test_what_there_is_no_time_for_is_said_to_be_skipped(tmp_path):
    def slow():
        time.sleep(90)
        return {}

    code, rows = _run(tmp_path, [_case("slow", slow), _case("next", dict)], deadline=time.monotonic() + 0.3)
    assert code == 0  # skipping is what a limit asks for
    assert rows["slow"]["message"] == "there was no time left to finish it"
    assert rows["next"] == rows["next"] | {"status": "skipped", "message": "there was no time left"}


def test_a_time_limit_passes_through_what_catches_exceptions():
    def patient():
        try:
            time.sleep(10)
        except Exception:
            pytest.fail("caught as an ordinary error")

    with pytest.raises(TimeLimitError), time_limit(0.05):
        patient()


def test_resuming_keeps_rows_and_fails_the_one_the_process_ended_in(tmp_path):
    rows = [
        {"name": "done", "pass": "forward", "status": "ok", "value": 1},
        {"name": "skipped", "pass": "forward", "status": "skipped"},
        {"name": "fatal", "pass": "forward", "status": "running"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    cases = [_case(name, lambda: {"value": 2}) for name in ("done", "skipped", "fatal", "new")]
    code, found = _run(tmp_path, cases, resume=True)
    assert code == 1
    assert {name: row.get("value") for name, row in found.items()} == {"done": 1, "skipped": 2, "fatal": None, "new": 2}
    assert found["fatal"]["message"] == "the process ended while this was measured"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to try")
def test_a_full_disk_costs_the_exit_code_and_no_measurement(tmp_path, capsys):
    (tmp_path / "rows.json").symlink_to("/dev/full")
    record: dict[str, Any] = {"machine": {"device_type": "cpu"}}
    cases = [_case(name, lambda: {"value": 1}) for name in ("first", "second")]
    assert run_cases(cases, tmp_path / "rows.json", record, deadline=math.inf, resume=False) == 1
    assert [row["status"] for row in record["rows"]] == ["ok", "ok"]
    told = capsys.readouterr().err
    assert "first forward: cannot write" in told
    assert "second forward: cannot write" in told


def test_a_number_that_json_does_not_have_costs_its_own_row_alone(tmp_path):
    code, rows = _run(tmp_path, [_case("nan", lambda: {"value": math.nan}), _case("next", lambda: {"value": 1})])
    assert code == 1
    assert rows["nan"]["message"].startswith("ValueError: Out of range float values")
    assert rows["next"]["value"] == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}', '{"rows": [{}]}', "\0"])
@pytest.mark.parametrize("file", ["bench.json", "environment.json"])
def test_a_damaged_file_is_named_before_anything_is_measured(tmp_path, capsys, content, file):
    (tmp_path / file).write_text(content)
    code = main(["bench", "--operator", "na2d_qk", "--quick", "--no-compile", "--resume", "--out", str(tmp_path)])
    assert code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{tmp_path / file} is no result that can be read" in told
    assert (tmp_path / file).read_text() == content


def test_a_lost_gpu_ends_the_run_with_a_code_of_its_own(tmp_path, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing, "synchronize", lost)
    code, rows = _run(tmp_path, [_case("culprit", lambda: lost(None)), _case("next", dict)])
    assert code == LOST
    assert list(rows) == ["culprit"]


def test_an_operator_meets_everything_that_stands_in_for_it():
    row = OPERATORS.measure(TINY["contmix2d"], backward=True)
    assert row["relative_error"] <= row["tolerance"] == 1e-5
    assert row["against"] == "reference"
    assert list(row["contenders"]) == ["ours", "naive", "unfused", "compiled"]
    for found in row["contenders"].values():
        assert 0 < found["p20_ms"] <= found["p50_ms"] <= found["p80_ms"]
        assert found["peak_bytes"] > 0
    floor = row["floor"]
    assert floor["memory_ms"] == pytest.approx(1000 * floor["bytes"] / 1e9)
    assert floor["operations_ms"] == pytest.approx(1000 * floor["operations"] / 1e12)
    assert floor["ms"] == max(floor["memory_ms"], floor["operations_ms"])
    assert row["left_out"] == {}
    best = {name: found["p50_ms"] for name, found in row.get("graph", row["contenders"]).items()}
    assert row["speed_up"]["naive"] == pytest.approx(best["naive"] / best["ours"])
    assert floor["fraction"] == pytest.approx(floor["ms"] / best["ours"])
    assert "channels_first" in OPERATORS.measure(TINY["depthwise_conv2d"], backward=False)["speed_up"]


def test_a_wrong_operator_is_never_timed(monkeypatch):
    correct = kernels.na2d_av

    def damaged(*arguments, **options):
        out = correct(*arguments, **options)
        return out if kernels.get_backend() == "reference" else 1.001 * out

    monkeypatch.setattr(kernels, "na2d_av", damaged)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(DisagreementError, match="output: relative error 1"):
        OPERATORS.measure(TINY["na2d_av"], backward=False)


def test_a_contender_that_cannot_run_is_left_out_with_the_reason(monkeypatch):
    def raising(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_operators, "UNFUSED", {"contmix2d": lambda options, backend: raising})
    row = OPERATORS.measure(TINY["contmix2d"], backward=False)
    assert row["left_out"] == {"unfused": "OutOfMemoryError: CUDA out of memory"}
    assert "naive" in row["speed_up"]

    monkeypatch.setattr(OperatorBench, "_too_large", lambda *_: "needs about 300 GB, 130 GB are free")
    row = OPERATORS.measure(TINY["na2d_qk"], backward=True)
    assert row["against"] == "eager"
    assert list(row["contenders"]) == ["ours"]
    assert row["left_out"] == dict.fromkeys(("naive", "compiled"), "needs about 300 GB, 130 GB are free")


@pytest.mark.parametrize("backward", [False, True])
def test_the_naive_paths_memory_is_not_underestimated(backward):
    for workload in (
        workloads.involution("test", 1, 64, (28, 28), 7, 16),
        workloads.neighborhood("na2d_softmax_av", "test", 1, 4, 16, (28, 28), 13),
        workloads.outlook("test", 1, 4, 16, (28, 28), 3, 2),
    ):
        bench_here = dataclasses.replace(OPERATORS, compiler=None)
        inputs, gradient = workload.draw_inputs(torch.float32, HERE), workload.draw_gradient(torch.float32, HERE)
        calls = bench_here.contenders(workload, inputs, gradient, backward=backward)
        peak = timing.peak_memory(calls["naive"], HERE)
        assert peak is not None
        assert peak <= naive_bytes(workload, torch.float32, backward=backward) <= 6 * peak, workload.name


def test_generation_inside_is_the_same_involution():
    handed, generated = (TINY[name] for name in ("involution2d", "involution2d_generate"))
    assert generated.output == handed.output
    inputs = generated.draw_inputs(torch.float64, torch.device("cpu"))
    shape = handed.inputs["weight"].shape  # pyright: ignore[reportAttributeAccessIssue]
    kernel = nn.functional.conv2d(inputs["features"], inputs["weight"][:, :, None, None], inputs["bias"]).view(shape)
    (out,) = generated.forward(inputs)
    torch.testing.assert_close(out, kernels.reference.involution2d(inputs["x"], kernel))


def test_benchmark_workloads_are_the_published_shapes():
    names = [f"{workload.output[0]} {workload.name}" for workload in benchmark_workloads()]
    for name in (
        "128 involution2d RedNet-50 64@56² K=7",
        "128 involution2d RedNet-50 512@7² K=7",
        "128 contmix2d OverLoCK-T 8×16@14² K=5,13",
        "128 contmix2d OverLoCK-T 16×16@7² K=5,7",
        "128 outlook_attention2d VOLO-D1 6×32@28² K=3 s=2",
        "2 involution2d RedNet-50 64@200×320 K=7",
    ):
        assert name in names
    assert len(set(names)) == len(names)


class _Peer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.layers(images)


def test_a_model_meets_itself_and_its_peer(monkeypatch):
    monkeypatch.setattr(ModelBench, "peer", lambda self, plan: self._placed(_Peer()))
    models = ModelBench(HERE, torch.float32, batch=2, size=(32, 32), compiler="eager", seconds=0.0, min_runs=2)
    row = models.measure(Plan("rednet26", peer=("torchvision", "resnet50"), compiled=True))
    assert row["relative_error"] <= row["tolerance"]
    assert set(row["contenders"]) == {"ours", "naive", "compiled", "peer", "peer_compiled"}
    times = {name: found["p50_ms"] for name, found in row["contenders"].items()}
    assert row["contenders"]["ours"]["images_per_second"] == pytest.approx(2000 / times["ours"])
    assert row["speed_up"]["naive"] == pytest.approx(times["naive"] / times["ours"])
    assert row["speed_up"]["peer_compiled"] == pytest.approx(times["peer_compiled"] / times["compiled"])
    assert row["left_out"] == {}


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    def missing(self, plan):
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setattr(ModelBench, "peer", missing)
    models = ModelBench(HERE, torch.float32, batch=2, size=(32, 32), compiler=None, seconds=0.0, min_runs=2)
    row = models.measure(Plan("rednet26", peer=("timm", "volo_d1_224")))
    assert row["left_out"] == {"peer": "ModuleNotFoundError: No module named 'timm'"}
    assert set(row["contenders"]) == {"ours", "naive"}


def test_the_command_writes_rows_and_shows_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "describe_machine", lambda device: {"device": "test", "device_type": device.type})
    (tmp_path / "environment.json").write_text(json.dumps({"machine": {"device": "test"}, "ceilings": CEILINGS}))
    assert main(["bench", "--operator", "na2d_qk", "--quick", "--out", str(tmp_path), "--no-compile"]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["complete"] is True
    assert record["ceilings"] == CEILINGS
    assert [(row["operator"], row["pass"], row["status"]) for row in record["rows"]] == [
        ("na2d_qk", "forward", "ok"),
        ("na2d_qk", "forward+backward", "ok"),
    ]
    assert "na2d_qk tiny 2×16@6×5 K=3" in capsys.readouterr().out
    assert not (tmp_path / "models.json").exists()


def test_bad_arguments_are_refused(tmp_path, capsys):
    for arguments, message in (
        (("--operator", "no such"), "--operator must match a name, 'no such' does not"),
        (("--model", "resnet50"), "got 'resnet50'"),
    ):
        assert main(["bench", "--quick", "--no-compile", "--out", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err
    for arguments in (
        ("--size", "31"),
        ("--batch", "0"),
        ("--dtype", "int8"),
        ("--seconds", "-1"),
        ("--device", "abacus"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["bench", *arguments])
        assert refused.value.code == 2


def test_compile_only_times_nothing(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(OperatorBench, "compile_only", lambda self, workload, backward: compiled.append(backward))
    monkeypatch.setattr(OperatorBench, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(bench, "_known_ceilings", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "--operator", "na2d_av", "--quick", "--compile-only", "--out", str(tmp_path)]) == 0
    assert compiled == [False, True]
    assert list(tmp_path.iterdir()) == []
