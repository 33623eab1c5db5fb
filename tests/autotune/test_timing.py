"""The stop-watch, the memory meter and what is written down with them."""

import json
import re
import subprocess

import pytest
import torch

from autotune import measure, timing
from autotune.timing import Timing
from tests.support import DEVICE

CPU = torch.device("cpu")


def test_calls_take_turns_after_one_untimed_run_each(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])  # a clock that only calls move

    def call(name, seconds):
        return lambda: order.append(name) or now.__setitem__(0, now[0] + seconds)

    times = timing.measure({"a": call("a", 0.25), "b": call("b", 0.5)}, CPU, seconds=0, min_runs=3, max_runs=3)
    assert order == ["a", "b"] * 4
    assert times == {"a": Timing(250, 250, 250, 3), "b": Timing(500, 500, 500, 3)}
    assert Timing.of([float(n) for n in range(1, 102)]) == Timing(p20_ms=21.0, p50_ms=51.0, p80_ms=81.0, runs=101)
    for seconds, runs in ((1, 9), (9, 2)):  # the time ends the runs, but not before the least of them
        found = timing.measure({"call": call("", seconds)}, CPU, seconds=8, min_runs=2, max_runs=1000)
        assert found["call"].runs == runs


def test_on_an_idle_device_no_call_hides_the_host_time_of_another(monkeypatch):
    """A GPU of which the host runs ahead: it begins a call's work when it is told of it and the one before is done."""
    host, gpu = [0.0], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu[0] = max(host[0], gpu[0])

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: host.__setitem__(0, max(host[0], gpu[0])))

    def call():  # 7 ms of the host, then 5 of the device
        host[0] += 7
        gpu[0] = max(host[0], gpu[0]) + 5

    calls = {"eager": lambda: host.__setitem__(0, host[0] + 90), "a": call, "b": call}
    for idle, times in ((True, (12, 12)), (False, (12, 7))):
        found = measure.in_turns(calls, torch.device("cuda"), seconds=1, min_runs=9, idle=idle)
        assert (found["a"].p50_ms, found["b"].p50_ms) == times


MEBIBYTE = 2**20


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_peak_memory_counts_what_is_held_at_once(device):
    device = torch.device(device)
    held = torch.zeros(4 * MEBIBYTE, dtype=torch.uint8, device=device)

    def chain():
        first = torch.zeros(8 * MEBIBYTE, dtype=torch.uint8, device=device)
        second = first + 1  # 16 MiB at once: the peak
        del first
        return second[: held.numel()] + held  # 8 + 4

    def nearly(expected):  # PyTorch makes tensors of some constants, a few bytes each
        return pytest.approx(expected, abs=100)

    assert timing.peak_memory(chain, device) == nearly(16 * MEBIBYTE)
    assert timing.peak_memory(lambda: held.add_(1), device) == nearly(0)
    assert timing.peak_memory(chain, device) == nearly(16 * MEBIBYTE)


def test_peak_memory_sees_temporaries_inside_operators():
    """PyTorch convolves float64 by unfolding, out of Python's sight."""
    x, weight = torch.ones(1, 8, 32, 32, dtype=torch.float64), torch.ones(8, 8, 7, 7, dtype=torch.float64)
    unfolded, output = 8 * (8 * 49) * 26**2, 8 * 8 * 26**2
    peak = timing.peak_memory(lambda: torch.nn.functional.conv2d(x, weight), CPU)
    assert peak is not None
    assert unfolded + output <= peak < 1.1 * (unfolded + output)


def test_copy_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(timing, "ceiling_seconds", lambda parts, *_: 0.002)
    assert timing.copy_bandwidth(CPU, size=4096) == 2 * 4096 / 0.002


@pytest.mark.parametrize("threads", [1, 3])
def test_every_way_to_a_ceiling_does_all_parts(monkeypatch, threads):
    ran, before = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = [lambda index=index: ran.append(index) for index in range(threads)]
    assert 0 < timing.ceiling_seconds(parts, CPU, 0.003) < 1
    monkeypatch.undo()
    torch.set_num_threads(before)
    assert len(ran) % threads == 0
    assert {ran.count(index) for index in range(threads)} == {len(ran) // threads}


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert timing.relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert timing.relative_error(expected.half(), expected.double()) == 0
    assert timing.relative_error(torch.full((2,), 0.5), torch.zeros(2)) == pytest.approx(0.5**0.5)
    assert not timing.relative_error(torch.tensor([float("nan"), 4.0]), expected) <= 1e9
    with pytest.raises(ValueError, match=r"out must have the shape of expected, \(2,\), got \(3,\)"):
        timing.relative_error(torch.zeros(3), expected)


@pytest.mark.parametrize(
    ("gpu", "folder"), [("NVIDIA H200", "NVIDIA_H200"), ("AMD Instinct(TM) MI300X / 2", "AMD_Instinct_TM_MI300X_2")]
)
def test_device_folder_is_a_plain_file_name(monkeypatch, gpu, folder):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert timing.device_folder(torch.device("cuda", 0)) == folder
    assert re.fullmatch(r"cpu_[A-Za-z0-9._]+", timing.device_folder(CPU))


def test_machine_is_described_in_json():
    machine = json.loads(json.dumps(timing.describe_machine(CPU)))
    assert machine["device"].startswith(machine["cpu"])
    assert machine["torch"] == torch.__version__
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$", machine["date"])
    git = ["git", "-C", str(timing.repository_root()), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert (machine["commit"] or "").removesuffix("-dirty") == head


def test_other_work_is_what_this_process_did_not_do(monkeypatch):
    clocks = iter([(10.0, 100.0, 5.0), (14.0, 109.0, 6.0)])  # by the clock, of all cores, of our own
    monkeypatch.setattr(measure, "_cpu_seconds", lambda: next(clocks))
    assert measure.other_work()() == pytest.approx((9 - 1) / 4)
    monkeypatch.setattr(measure, "_cpu_seconds", lambda: None)
    assert measure.other_work()() is None
