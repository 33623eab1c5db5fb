"""The suite behind ``make gpu``: phases that cannot take each other with them, and the summary of what they found."""

import json
import os
import signal
import sys

import pytest
import torch

from autotune import bench, ceilings
from autotune.__main__ import main
from autotune.cases import LOST
from autotune.passes import PASSES
from autotune.results import ceilings_told, tables
from notebooks.results import suite
from notebooks.results.folder import Folder
from notebooks.results.predicted import measure
from notebooks.results.suite import Phase, phases_of, run_phases, summary
from tests.support import in_a_process

ENVIRONMENT = dict(os.environ)


def _python(code):
    return lambda seconds, again: [sys.executable, "-c", f"seconds, again = {seconds}, {again}\n{code}"]


def _phases(folder, *phases, seconds=60.0):
    return {found["name"]: found for found in run_phases(phases, folder, ENVIRONMENT, seconds)}


@pytest.mark.slow
def test_no_phase_takes_another_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "GRACE", 0.5)
    finished = {}

    def keep(name):
        return lambda complete: finished.update({name: complete})

    hang = "import time; print('hanging', flush=True); time.sleep(600)"
    found = _phases(
        tmp_path,
        Phase("failing", _python("print('what went wrong'); raise SystemExit(1)"), 1, finish=keep("failing")),
        Phase("hanging", _python(hang), 1, finish=keep("hanging")),
        Phase("well", _python("print('done')"), 10, background=([sys.executable, "-c", hang],)),
        seconds=24.0,
    )
    assert [phase["status"] for phase in found.values()] == ["failed", "out of time", "ok"]
    assert found["failing"]["exit_code"] == 1
    assert "what went wrong" in found["failing"]["log"]
    assert found["hanging"]["log"][0] == "hanging"
    assert finished == {"failing": True, "hanging": False}
    assert found["hanging"]["seconds"] < 20
    assert "log" not in found["well"]
    assert "| hanging | out of time |" in (tmp_path / "summary.md").read_text()


def test_times_of_kernels_are_kept_where_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        measure.main([str(tmp_path / "kernels.json")])
    assert "this measures a GPU, and there is none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_crashed_process_is_started_again_and_told(tmp_path):
    codes = {
        "crash": f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)}) if not again else None",
        "lost": f"raise SystemExit(0 if again else {LOST})",
        "always": f"raise SystemExit({LOST})",
    }
    found = _phases(tmp_path, *(Phase(name, _python(code), 1) for name, code in codes.items()))
    ended = {name: (phase["status"], phase["restarts"]) for name, phase in found.items()}
    assert ended == {"crash": ("ok", 1), "lost": ("ok", 1), "always": ("failed", suite.RESTARTS)}
    assert found["always"]["message"] == "lost the GPU"


def test_what_came_of_every_test_is_kept(tmp_path):
    (tmp_path / "test_toy.py").write_text(
        "import pytest\n@pytest.fixture\ndef broken(): 1 / 0\ndef test_error(broken): ...\ndef test_passes(): ...\n"
        "def test_fails(): assert 0, 'far off\\nsecond line'\ndef test_skips(): pytest.skip()\n"
    )
    command = ["-m", "pytest", "-p", "tests.device_guard", "-n", "1", "test_toy.py"]
    in_a_process(*command, cwd=tmp_path, TEST_RESULTS=str(tmp_path / "kept"))
    assert json.loads((tmp_path / "kept").read_text()) == {
        "counts": {"error": 1, "passed": 1, "failed": 1, "skipped": 1},
        "failures": ["test_toy.py::test_error: ZeroDivisionError: division by zero",
                     "test_toy.py::test_fails: AssertionError: far off"],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the suite on a CPU, in the interpreter")
def test_the_whole_suite_on_tiny_shapes(tmp_path, capsys):
    assert main(["suite", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    names = {"environment.json", "tests.json", "cpu.json", "bench.json", "models.json", "summary.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = Folder(tmp_path)
    assert [phase["status"] for phase in found.environment["phases"]] == ["ok"] * 5
    assert found.environment["ceilings"]["copy_bytes_per_second"] > 0
    assert found.environment["launch_microseconds"]["direct"] > 0
    assert found.tests["complete"] is True
    assert found.tests["counts"] == {"passed": 1}
    assert {row["status"] for row in (*found.operators, *found.models)} == {"ok"}
    passes = {(row["operator"], kind) for row in found.operators for kind in PASSES}
    assert sorted((row["operator"], row["pass"]) for row in found.operators) == sorted(passes)
    assert all(found.load(f"{name}.json")["complete"] for name in ("bench", "models"))
    assert [(row["name"], row["pass"]) for row in found.models] == [("rednet26", k) for k in ("inference", "training")]
    assert all(list(row["speed_up"]) == ["naive"] for row in found.models)
    assert found.load("bench.json")["ceilings"] == found.environment["ceilings"]
    tuned = {key.split()[0] for key in json.loads((tmp_path / "cpu.json").read_text())["entries"]}
    assert tuned == {"aggregate.rows", "correlate.rows", "transpose.rows"}
    shown = capsys.readouterr().out
    assert "A trial of the command without a GPU" in shown
    assert "| operators | ok |" in shown


def test_the_commands_of_the_full_suite_are_ones_the_parser_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_has_room", lambda device: True)
    monkeypatch.setattr(suite, "gpu_name", lambda device: "NVIDIA H200")
    asked = []
    monkeypatch.setattr(bench, "run", lambda arguments: asked.append(arguments) or 0)
    monkeypatch.setattr("autotune.tune.run", lambda arguments: asked.append(arguments) or 0)
    monkeypatch.setattr("models.commands.types.device", torch.device)
    phases = phases_of(tmp_path, torch.device("cuda:0"), tmp_path, quick=False)
    assert [phase.name for phase in phases] == ["environment", "tests", "tuning", "operators", "models"]
    assert sum(phase.seconds for phase in phases) <= suite.SECONDS < 540
    for phase in phases:
        for command in (phase.command(100, True), *phase.background):
            if "pytest" not in command:
                assert main(command[3:]) == 0
    filled = len(suite.FILLED_OPERATORS) + len(suite.FILLED_MODELS)
    assert len(asked) == 4 + filled
    assert all(arguments.device == torch.device("cuda:0") for arguments in asked)
    assert [arguments.compile_only for arguments in asked if hasattr(arguments, "compile_only")].count(True) == filled


def test_the_summary_tells_what_was_measured_and_what_was_not(tmp_path):
    found = Folder(suite.ROOT / "notebooks" / "results" / "NVIDIA_H200")
    told = summary(found.path, [{"name": "tests", "status": "failed", "seconds": 12.0, "message": "lost the GPU"}])
    lines = told.splitlines()
    assert lines[0] == "# NVIDIA H200"
    assert "| tests | failed | 12 | lost the GPU |" in lines
    assert f"Ceilings: {ceilings_told(found.environment['ceilings'])}" in lines
    for table in tables(found.operators, found.models):
        assert table.markdown() in told
    assert len(found.test_runs) == 2
    for run in found.test_runs:
        assert not run["complete"]
        counts = told.partition(f"{run['of']} at commit {run['commit'][:7]}: ")[2].partition(" (cut short).\n")[0]
        assert f"{run['counts']['passed']} passed" in counts
        assert all(f"- {failure}" in lines for failure in run["failures"])
    for row in (*found.operators, *found.models):
        name = f"{row['name']} {row['pass']}"
        assert row["status"] == "ok" or f"- skipped: {name}: {row['message']}" in lines
        for contender, reason in row.get("left_out", {}).items():
            assert f"- left out: {name}, {contender}: {reason}" in lines
    assert summary(tmp_path / "empty", []).startswith("# unknown device\n")


def test_a_matrix_product_is_timed_on_random_data(monkeypatch):
    seen = []

    def ceiling_seconds(parts, device, seconds):
        seen.append(torch.cat([part() for part in parts]))
        return 2e-3

    monkeypatch.setattr(ceilings.timing, "ceiling_seconds", ceiling_seconds)
    rate = ceilings.matmul_rate(torch.device("cpu"), torch.float32, 32, 0.0)
    assert rate == pytest.approx(2 * 32**3 / 2e-3)
    assert seen[0].shape == (32, 32)
    assert seen[0].std() > 1
