"""Rows of results survive what happens while they are measured: errors, limits of time, full disks, a lost GPU."""

import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from autotune import timing
from autotune.cases import LOST, Case, run_cases
from autotune.measure import beside_others


def _case(name, measure):
    return Case({"name": name, "pass": "forward"}, measure)


def _run(path, cases, **options):
    record: dict[str, Any] = {"machine": {"device_type": "cpu"}}
    code = run_cases(cases, path / "rows.json", record, **options)
    written = json.loads((path / "rows.json").read_text())
    assert written["rows"] == record["rows"]
    return code, {row["name"]: row for row in written["rows"]}


def test_every_row_is_on_disk_and_said_before_the_next_begins(tmp_path, capsys):
    def second():
        said = capsys.readouterr().err.splitlines()
        assert said == ["[1/4] first forward", "[1/4] first forward: ok", "[2/4] second forward"]
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert [(row["name"], row["status"]) for row in rows] == [("first", "ok"), ("second", "running")]
        raise ValueError("no such shape\nsecond line")

    cases = [_case("first", lambda: {"speed_up": 2}), _case("second", second)]
    cases += [_case("nan", lambda: {"value": math.nan}), _case("last", dict)]
    code, rows = _run(tmp_path, cases)
    assert code == 1
    assert rows["first"]["speed_up"] == 2
    assert rows["second"]["message"] == "ValueError: no such shape"
    assert "second line" in rows["second"]["traceback"]
    assert rows["nan"]["message"].startswith("ValueError: Out of range float values"), "JSON has no such number"
    assert rows["last"]["status"] == "ok"


def test_rows_beyond_the_deadline_are_skipped(tmp_path):
    def slow():
        try:
            time.sleep(90)
        except Exception:
            pytest.fail("caught as an ordinary error")
        return {}

    code, rows = _run(tmp_path, [_case("slow", slow), _case("next", dict)], deadline=time.monotonic() + 0.3)
    assert code == 0  # skipping is what a limit asks for
    assert rows["slow"]["message"] == "there was no time left to finish it"
    assert rows["next"] == rows["next"] | {"status": "skipped", "message": "there was no time left"}


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
    assert run_cases(cases, tmp_path / "rows.json", record) == 1
    assert [row["status"] for row in record["rows"]] == ["ok", "ok"]
    told = capsys.readouterr().err
    assert "first forward: cannot write" in told
    assert "second forward: cannot write" in told


def test_a_lost_gpu_ends_the_run_with_a_code_of_its_own(tmp_path, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing, "synchronize", lost)
    code, rows = _run(tmp_path, [_case("culprit", lambda: lost(None)), _case("next", dict)])
    assert code == LOST
    assert list(rows) == ["culprit"]


def _measured_alone(folder, log):
    """Compiles until two do, then measures: what it does is told in a file that several write."""
    with beside_others(folder) as alone, open(log, "a", buffering=1) as file:
        file.write("compile\n")
        while Path(log).read_text().count("compile") < 2:
            time.sleep(0.05)
        alone()
        file.write("begin\n")
        time.sleep(0.3)
        file.write("end\n")
    return {"value": 1}


def test_processes_compile_side_by_side_and_measure_alone(tmp_path):
    measure = functools.partial(_measured_alone, str(tmp_path), str(tmp_path / "log"))
    cases = [_case("crashing", functools.partial(os._exit, 1)), _case("failing", functools.partial(int, "x"))]
    cases += [_case(name, measure) for name in ("first", "second")]
    code, rows = _run(tmp_path, cases, jobs=4)
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["failed", "failed", "ok", "ok"]
    assert rows["crashing"]["message"].startswith("BrokenProcessPool: ")
    assert rows["failing"]["message"].startswith("ValueError: invalid literal")
    assert (tmp_path / "log").read_text().split() == ["compile"] * 2 + ["begin", "end"] * 2
