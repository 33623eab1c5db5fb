"""Tuning: candidates must agree before they are timed; what ``tune`` passes over, and what survives an interruption."""

import argparse
import json
from unittest import mock

import pytest
import torch

import autotune
from autotune import tune, tuner
from autotune.__main__ import main
from autotune.tune import Tuning
from kernels.tuning import choose
from kernels.tuning.choose import Request, key_of, look_up
from kernels.tuning.store import Store, user_folder
from tests.kernels.toy import BLOCKS, CPU, GPU, TOY, Config, Problem
from tests.support import in_a_process

pytestmark = pytest.mark.usefixtures("store_folders")

QUICK = ("tune", "--all", "--quick", "--device", "cpu")


def _key(pixels):
    return key_of(TOY, Problem(pixels))


def _launch(pixels, wrong=(), fails=None):
    """A launch over that many pixels, and what fails after it."""

    def launch():
        TOY(torch.empty(pixels), wrong)
        if fails is not None:
            raise fails

    return launch


def _clock_of(fastest):
    """Stands in for a clock: times follow from the config, so that no test depends on the machine."""
    return lambda call: 1.0 + abs(call.__defaults__[0].block - fastest)


_clock = _clock_of(1)  # a config takes as many milliseconds as its block has elements


# ---- one problem


def _request(pixels=100, **keywords):
    return Request(TOY, Problem(pixels), CPU, (torch.ones(pixels),), keywords)


def test_the_fastest_right_candidate_wins_and_is_kept():
    outcomes = tuner.tune(_request(), _clock_of(32))
    assert outcomes[0].config.block == 32
    assert {outcome.config.block for outcome in outcomes} == {8, 16, 32, 64}  # 128 is not valid here
    assert look_up(TOY, Problem(100), GPU) == (Config(32), "store")
    choose.forget()  # as a new process would
    assert look_up(TOY, Problem(100), GPU) == (Config(32), "store")
    entry = Store(user_folder(), GPU).read()[_key(100)]
    assert entry["milliseconds"] == 1.0
    assert entry["heuristic_milliseconds"] == 17.0


def test_a_wrong_or_failing_candidate_is_never_chosen():
    outcomes = tuner.measure_candidates(_request(wrong=(32,), broken=(64,)), _clock_of(32))
    assert outcomes[0].config.block == 16
    reasons = {o.config.block: o.rejected for o in outcomes if o.rejected}
    assert set(reasons) == {32, 64}
    assert "off by 1.0e+00" in str(reasons[32])
    assert "out of resource" in str(reasons[64])


def test_nan_never_agrees():
    assert tuner.disagreement(torch.tensor([1.0, float("nan")]), torch.ones(2))
    assert tuner.disagreement([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.full((2,), 1.001)])
    assert tuner.disagreement(torch.ones(2), torch.ones(2)) is None


def test_inside_tuning_a_problem_without_an_entry_is_tuned(monkeypatch):
    """On a GPU a problem is tuned when it is met inside, though not while a graph is captured; the heuristic's config
    is used where every candidate is wrong."""
    with autotune.tuning():
        assert TOY.choose(torch.ones(100), broken=BLOCKS) == Config(16), "without a GPU nothing is tuned"
    device, capturing, tune_one = torch.device("cuda", 0), [False], tuner.tune
    monkeypatch.setattr(choose, "gpu_name", lambda device: "GPU")
    monkeypatch.setattr(choose, "_device_of", lambda arguments: device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr("autotune.tuner.gpu_name", lambda device: "GPU")
    monkeypatch.setattr("autotune.tuner.tune", lambda request: tune_one(request, _clock_of(64)))
    assert TOY.choose(torch.ones(100)) == Config(16)
    with autotune.tuning():
        capturing[0] = True
        assert TOY.choose(torch.ones(100)) == Config(16)
        capturing[0] = False
        assert TOY.choose(torch.ones(100)) == Config(64)
        with pytest.warns(RuntimeWarning, match="no config of toy pixels=110 .* ran and agreed"):
            assert TOY.choose(torch.ones(110), broken=BLOCKS) == Config(16)
    assert TOY.choose(torch.ones(100)) == Config(64)
    assert TOY.choose(torch.ones(90)) == Config(16)


def test_the_environment_asks_for_tuning_in_the_whole_program():
    code = "import gc, autotune, kernels.tuning.choose as choose; gc.collect(); print(choose.on_miss is not None)"
    assert in_a_process("-c", code, DYNAMIC_KERNELS_AUTOTUNE="1").stdout == "True\n"
    assert choose.on_miss is None, "nothing asks here"


# ---- the command


@pytest.fixture
def command(monkeypatch):
    """Runs ``tune`` on given launches, as it would on a GPU."""

    def run(launches, *arguments, time_call=_clock):
        monkeypatch.setattr(tune, "_launching", lambda *_: iter(launches))
        monkeypatch.setattr(tune, "_interpreted_milliseconds", time_call)
        monkeypatch.setattr(tune, "interpreting", lambda: True)
        return main([*QUICK, *arguments])

    return run


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
    assert list(tuning.rows) == [_key(49), _key(3000)]
    assert set(_stored()) == set(tuning.rows)
    row = tuning.rows[_key(49)]
    assert (row["milliseconds"], row["heuristic_milliseconds"], row["gain"]) == (8.0, 16.0, 2.0)
    assert row["config"] == {"block": 8}
    assert row["tried"] == 3
    assert list(_tune([*launches, _launch(196)]).rows) == [_key(196)]
    assert len(_tune(launches, force=True).rows) == 2


def test_an_interruption_keeps_what_is_done_and_the_next_run_goes_on():
    launches = [_launch(20), _launch(21), _launch(22)]
    tuning = Tuning(CPU, time_call=mock.Mock(side_effect=[16.0, 8.0, KeyboardInterrupt]))  # in the second problem
    tuning.collect(iter(launches))
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(iter(launches))
    assert list(_stored()) == list(tuning.rows) == [_key(20)]
    assert tuning.left == [_key(21), _key(22)]
    choose.forget()
    assert list(_tune(launches).rows) == tuning.left
    assert _tune([_launch(23)], deadline=0.0).left == [_key(23)], "past the deadline none is begun"


def test_one_failure_does_not_cost_the_others(monkeypatch, capsys):
    broken = _launch(20, fails=torch.OutOfMemoryError("CUDA out of memory"))
    tuning = _tune([broken, _launch(21, wrong=BLOCKS), _launch(22)])
    assert tuning.rows[_key(21)]["config"] is None
    assert len(tuning.rows[_key(21)]["rejected"]) == 2
    assert list(_stored()) == [_key(20), _key(22)]
    assert set(tuning.errors) == {"OutOfMemoryError: CUDA out of memory"}

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(TOY, "reference", too_large)
    (row,) = _tune([_launch(23)]).rows.values()
    assert row["failure"] == "OutOfMemoryError: too large"
    assert row["config"] is None
    assert "toy pixels=23 dtype=float32: no config agreed" in capsys.readouterr().err


def test_what_ended_a_run_is_passed_over_by_the_next(tmp_path, monkeypatch, capsys, command):
    launches, arguments = [_launch(20), _launch(21)], ("--json", "--passing-over", str(tmp_path / "noted"))
    with monkeypatch.context() as lost:
        lost.setattr(tune, "device_lost", lambda device: True)
        assert command(launches, *arguments) == tune.LOST
    assert "the GPU was lost while tuning toy pixels=20" in capsys.readouterr().err
    assert command(launches, *arguments) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["passed_over"] == [_key(20)]
    assert [row["key"] for row in record["tuned"]] == [_key(21)]
    assert (tmp_path / "noted").read_text() == f"{_key(20)}\n"


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_tuned(tmp_path, monkeypatch, capsys, command):
    obstacle = tmp_path / "file"
    obstacle.write_text("where the folder should be")
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(obstacle))
    assert command([_launch(20)], time_call=lambda call: pytest.fail("tuned in vain")) == 2
    told = capsys.readouterr()
    assert f"error: cannot write tuned configs at {obstacle}/cpu.json" in told.err
    assert "Wrote" not in told.err + told.out
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(tmp_path / "store"))
    update = Store.update  # which fails only later
    monkeypatch.setattr(Store, "update", lambda store, entries: not entries and update(store, entries))
    assert command([_launch(20)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"not written to {user_folder()}/cpu.json: toy pixels=20" in told
    assert "Wrote" not in told


def test_the_table_names_problem_config_times_and_gain(capsys, command):
    assert command([_launch(20), _launch(21, wrong=BLOCKS)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "toy pixels=20 dtype=float32 │ block=8 │ 16.0000 │ 8.0000 │ 2.00×" in shown
    assert "toy pixels=21 dtype=float32 │ none: output 0 is off by" in shown
    assert command([_launch(20)]) == 0
    assert "Everything is tuned already" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the command on a CPU, in the interpreter")
def test_a_model_is_collected_without_running_a_kernel():
    arguments = argparse.Namespace(model="rednet26", quick=True, batch=2, size=None, dtype=torch.float32, training=True)
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
from autotune.precompile import absent_device, build, builds
from kernels.tuning.choose import observing
from kernels.aggregation.rows import aggregate
from kernels.launch import record_launches
from kernels.windows import Window

driver.set_active(absent_device(GPUTarget("cuda", 90, 32)))
found = []
x, weight = torch.randn(1, 2, 16, 8, 8), torch.randn(1, 2, 3, 3, 8, 8)
with record_launches() as launches, observing(lambda request: found.extend(builds(request, 1))):
    aggregate(weight, x, Window((3, 3), padding=(1, 1)))
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
    done = in_a_process("-c", AHEAD, tmp_path, TRITON_INTERPRET="", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
