"""``python -m autotune tune``: what is tuned, what is passed over, and what survives an interruption."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from autotune import tune
from autotune.__main__ import main
from autotune.tune import Tuning
from kernels.tuning import choose, tunable
from kernels.tuning.choose import key_of
from kernels.tuning.store import Store, user_folder

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tries the command on a CPU, in the interpreter")


@dataclasses.dataclass(frozen=True)
class Config:
    block: int

    def valid(self, problem):
        return True


class Problem(NamedTuple):
    pixels: int


def _heuristic(problem: Problem) -> Config:
    return Config(16)


def _reference(x, reference, fails):
    if isinstance(reference, Exception):
        raise reference
    return torch.full((4,), reference)


@tunable(
    (Config(8), Config(16), Config(32)),
    _heuristic,
    problem=lambda x, *_: Problem(x.numel()),
    reference=_reference,
    name="toy",
)
def TOY(x, reference, fails, *, config):
    if fails is not None:
        raise fails
    return torch.ones(4)


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(choose, "shipped_folder", lambda: tmp_path / "shipped")
    choose.forget()
    yield
    choose.forget()


def _launch(pixels, reference: object = 1.0, fails=None):
    """A launch over that many pixels that its reference agrees with at 1, and what fails after it."""

    def launch():
        TOY(torch.empty(pixels), reference, None)
        if fails is not None:
            raise fails

    return launch


def _clock(call):
    """Times follow from the config: 8 is the fastest."""
    return float(call.__defaults__[0].block)


def _tune(launches, **options):
    tuning = Tuning(CPU, time_call=_clock, **options)
    tuning.collect(iter(launches))
    tuning.tune(iter(launches))
    return tuning


def _stored():
    return Store(user_folder(), "cpu").read()


def test_tunes_what_has_no_entry_and_nothing_else():
    launches = [_launch(49), _launch(3000), _launch(3136)]  # the last two share a key
    tuning = _tune(launches)
    assert list(tuning.rows) == [key_of(TOY, Problem(49)), key_of(TOY, Problem(3000))]
    assert set(_stored()) == set(tuning.rows)
    row = tuning.rows[key_of(TOY, Problem(49))]
    assert (row["milliseconds"], row["heuristic_milliseconds"], row["gain"]) == (8.0, 16.0, 2.0)
    assert row["config"] == {"block": 8}
    assert row["tried"] == 3
    assert list(_tune([*launches, _launch(196)]).rows) == [key_of(TOY, Problem(196))]
    assert len(_tune(launches, force=True).rows) == 2


def test_an_interruption_keeps_what_is_done_and_the_next_run_goes_on():
    launches = [_launch(1), _launch(2), _launch(3)]
    calls = []

    def interrupted(call):
        calls.append(call)
        if len(calls) > 3:  # in the second problem
            raise KeyboardInterrupt
        return _clock(call)

    tuning = Tuning(CPU, time_call=interrupted)
    tuning.collect(iter(launches))
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(iter(launches))
    assert list(_stored()) == list(tuning.rows) == [key_of(TOY, Problem(1))]
    assert tuning.left == [key_of(TOY, Problem(2)), key_of(TOY, Problem(3))]
    choose.forget()
    assert list(_tune(launches).rows) == tuning.left


def test_past_the_deadline_none_is_begun():
    assert _tune([_launch(1)], deadline=0.0).left == [key_of(TOY, Problem(1))]
    assert _stored() == {}


def test_one_failure_does_not_cost_the_others():
    broken = _launch(1, fails=torch.OutOfMemoryError("CUDA out of memory"))
    wrong = _launch(2, reference=2.0)
    tuning = _tune([broken, wrong, _launch(3)])
    assert tuning.rows[key_of(TOY, Problem(2))]["config"] is None
    assert len(tuning.rows[key_of(TOY, Problem(2))]["rejected"]) == 3
    assert list(_stored()) == [key_of(TOY, Problem(1)), key_of(TOY, Problem(3))]
    assert set(tuning.errors) == {"OutOfMemoryError: CUDA out of memory"}


def test_a_reference_that_fails_is_a_row_of_its_own(capsys):
    (row,) = _tune([_launch(1, reference=torch.OutOfMemoryError("too large"))]).rows.values()
    assert row["failure"] == "OutOfMemoryError: too large"
    assert row["config"] is None
    assert "toy pixels=1: no config agreed" in capsys.readouterr().err


def test_what_ended_a_run_is_passed_over_by_the_next(tmp_path, monkeypatch, capsys):
    launches = [_launch(1), _launch(2)]
    monkeypatch.setattr(tune, "_launching", lambda *_: iter(launches))
    monkeypatch.setattr(tune, "_interpreted_milliseconds", _clock)
    arguments = ("tune", "--all", "--quick", "--device", "cpu", "--json", "--passing-over", str(tmp_path / "noted"))
    monkeypatch.setattr(tune, "interpreting", lambda: True)
    with monkeypatch.context() as lost:
        lost.setattr(tune, "device_lost", lambda device: True)
        assert main(arguments) == tune.LOST
    assert "the GPU was lost while tuning toy pixels=1" in capsys.readouterr().err
    assert main(arguments) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["passed_over"] == [key_of(TOY, Problem(1))]
    assert [row["key"] for row in record["tuned"]] == [key_of(TOY, Problem(2))]


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_tuned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "_launching", lambda *_: iter([_launch(1)]))
    monkeypatch.setattr(tune, "_interpreted_milliseconds", lambda call: pytest.fail("tuned in vain"))
    monkeypatch.setattr(tune, "interpreting", lambda: True)
    obstacle = tmp_path / "file"
    obstacle.write_text("where the folder should be")
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(obstacle))
    assert main(["tune", "--all", "--quick", "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert f"error: cannot write tuned configs at {obstacle}/cpu.json" in told.err
    assert "Wrote" not in told.err + told.out
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(tmp_path / "store"))
    assert main(["tune", "--all", "--quick", "--device", "cpu", "--passing-over", str(obstacle / "noted")]) == 2
    assert f"error: cannot write {obstacle}/noted: Not a directory" in capsys.readouterr().err


def test_what_cannot_be_kept_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tune, "_launching", lambda *_: iter([_launch(1)]))
    monkeypatch.setattr(tune, "_interpreted_milliseconds", _clock)
    monkeypatch.setattr(tune, "interpreting", lambda: True)
    update = Store.update
    monkeypatch.setattr(Store, "update", lambda store, entries: not entries and update(store, entries))
    assert main(["tune", "--all", "--quick", "--device", "cpu"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"not written to {user_folder()}/cpu.json: toy pixels=1" in told
    assert "Wrote" not in told


@interpreted
def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    assert main(["tune", "--all"]) == 2
    assert "tuning times kernels on a GPU, and there is none here" in capsys.readouterr().err
    assert not user_folder().exists()
    assert main(["tune", "--operator", "no such operator", "--quick", "--device", "cpu"]) == 2
    assert "--operator must match a name, 'no such operator' does not" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["tune", "--model", "rednet26", "--all"])
    assert refused.value.code == 2


@interpreted
def test_an_operator_from_the_command_line(capsys):
    arguments = ("tune", "--operator", "na2d_av tiny", "--quick", "--device", "cpu")
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    names = [row["key"].split()[0] for row in record["tuned"]]
    assert names == ["gather.aggregate", "gather.correlate", "gather.transpose"]
    assert set(_stored()) == {row["key"] for row in record["tuned"]}
    assert record["left"] == record["errors"] == []


def test_the_table_names_problem_times_gain_and_config(monkeypatch, capsys):
    monkeypatch.setattr(tune, "_launching", lambda *_: iter([_launch(1), _launch(2, reference=2.0)]))
    monkeypatch.setattr(tune, "_interpreted_milliseconds", _clock)
    monkeypatch.setattr(tune, "interpreting", lambda: True)
    assert main(["tune", "--all", "--quick", "--device", "cpu"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "toy pixels=1 │ block=8 │ 16.0000 │ 8.0000 │ 2.00×" in shown
    assert "toy pixels=2 │ none: output 0 is off by" in shown
    monkeypatch.setattr(tune, "_launching", lambda *_: iter([_launch(1)]))
    assert main(["tune", "--all", "--quick", "--device", "cpu"]) == 0
    assert "Everything is tuned already" in capsys.readouterr().out


@interpreted
def test_a_model_is_collected_without_running_a_kernel():
    arguments = argparse.Namespace(
        model="rednet26", quick=True, batch=2, size=None, dtype=torch.float32, contiguous=False, training=True
    )
    tuning = Tuning(CPU, most=2)
    tuning.collect(tune._launching(arguments, CPU))
    assert tuning.errors == []
    names = {key.split()[0] for key in tuning.found}
    assert names == {"involution_generate", "involution_generate_transpose", "correlate.rows"}
    assert all("dtype=float32" in key for key in tuning.found)
    assert {build.name for build in tuning.work} == {"_correlate_kernel", "weighted_sum_kernel"}


AHEAD = """
import sys
import torch
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from autotune.precompile import AbsentDevice, build, builds
from kernels.tuning.choose import observing
from kernels.aggregation.gather import gather_aggregate
from kernels.launch import record_launches
from kernels.windows import Window

driver.set_active(AbsentDevice(GPUTarget("cuda", 90, 32)))
found = []
x, weight = torch.randn(1, 2, 16, 8, 8), torch.randn(1, 2, 3, 3, 8, 8)
with record_launches() as launches, observing(lambda request: found.extend(builds(request, 1))):
    gather_aggregate(weight, x, Window((3, 3), padding=(1, 1)))
(described,) = found
build(described)
cubins = lambda: sorted(Path(sys.argv[1]).glob("*/*.cubin"))
built = cubins()
assert len(built) == 1, built
kernel, grid, arguments, options = launches[0]
kernel.device_caches.clear()  # as another process would find it
kernel.warmup(grid=grid, **arguments, **options)
assert cubins() == built, "a launch compiles something else than was built for it"
build(described, GPUTarget("cuda", 80, 32))
assert len(cubins()) == 2, "another architecture's code is its own"
assert driver.active.get_current_target().arch == 90
"""


def test_what_is_compiled_ahead_is_what_a_launch_asks_for(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
