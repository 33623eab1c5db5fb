"""Stored configs: ``python -m autotune show`` tells whether launches use each, ``verify`` finds a wrong one."""

import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import kernels
from autotune import tunables, verify
from autotune.__main__ import main
from autotune.tunables import find_tunables, problem_of
from kernels.launch import record_launches
from kernels.tuning import choose
from kernels.tuning.choose import config_of, gpu_name, key_of, look_up, observing, triton_version
from kernels.tuning.store import Store
from tests.kernels.toy import TOY, Config, Problem, entry_of
from tests.support import DEVICE


@pytest.fixture
def folders(store_folders, monkeypatch):
    """The store's and the shipped configs', where the toy is the only kernel."""
    monkeypatch.setattr(tunables, "find_tunables", lambda: {"toy": TOY})
    return store_folders


# ---- show


GPU = "NVIDIA H200"
ENTRY = entry_of(TOY, Config(64))
KEY = key_of(TOY, Problem(196))


def _shown(capsys, *arguments):
    assert main(["show", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


UNUSED = {  # key -> entry, and a part of the reason
    KEY.replace("196", "9"): ({"config": {"block": 8}}, "tuned with triton None"),
    KEY.replace("196", "784"): (ENTRY | {"triton": "3.0"}, f"tuned with triton 3.0, this is {triton_version()}"),
    KEY.replace("196", "1024"): (ENTRY | {"source": "0"}, "the kernel's code has changed since"),
    KEY.replace("196", "49"): (ENTRY | {"config": {"block": 7}}, "the kernel offers no such config"),
    KEY.replace("196", "16"): (ENTRY, "the config is not valid for this problem"),
    KEY.replace("196", "-" + "9" * 3000): (ENTRY, "the config is not valid"),
    "scatter pixels=49": (ENTRY, "there is no such kernel"),
    "toy pixels=many dtype=float32": (ENTRY, "does not name a problem of the kernel"),
    KEY.replace("196", "1000"): (ENTRY, "is not how the kernel toy writes this problem"),
    "[red]line\n": (
        ENTRY | {"milliseconds": float("inf"), "heuristic_milliseconds": 10**400},
        "there is no such kernel",
    ),
    "": ({"config": {"block": float("nan")}, "milliseconds": True}, "there is no such kernel"),
}


def test_every_reason_not_to_use_an_entry_is_named(folders, capsys):
    Store(folders[0], GPU).update({KEY: ENTRY} | {key: entry for key, (entry, _) in UNUSED.items()})
    shown = _shown(capsys)
    assert shown["folders"]["store"] == str(folders[0])
    found = {row["key"]: row["unused"] for row in shown["entries"]}
    assert found.pop(KEY) is None
    assert {key: reason for key, (_, reason) in UNUSED.items() if reason not in found.pop(key)} == found == {}
    assert {row["gpu"] for row in shown["entries"]} == {"NVIDIA_H200"}
    assert look_up(TOY, Problem(196), GPU) == (Config(64), "store")
    assert {look_up(TOY, Problem(pixels), GPU).source for pixels in (9, 16, 49, 784, 1024)} == {"heuristic"}
    assert main(["show"]) == 0
    text = capsys.readouterr().out
    for part in ("block=64", "used", "0.2500 │        0.5000", "not used:", "[red]line", f"store: {folders[0]}"):
        assert part in text


def test_a_heuristic_that_cannot_take_a_problem_is_named(folders, capsys, monkeypatch):
    def fails(problem: Problem) -> None:
        raise ZeroDivisionError

    Store(folders[0], GPU).update({KEY: ENTRY})
    monkeypatch.setattr(TOY, "heuristic", fails)
    assert _shown(capsys)["entries"][0]["unused"].startswith("no launch can meet this problem (ZeroDivisionError")


def test_what_ships_for_the_same_chip_is_shown_where_launches_use_it(folders, capsys):
    (gpu, chip), other = next(iter(choose.SAME_CHIP.items())), key_of(TOY, Problem(225))
    Store(folders[0], gpu).update({KEY: ENTRY})
    Store(folders[1], chip).update({KEY: ENTRY, other: ENTRY})
    for name in (gpu, Store(folders[0], gpu).path.stem):
        rows = _shown(capsys, "--gpu", name)["entries"]
        assert [(row["source"], row["key"], row["unused"]) for row in rows] == [
            ("store", KEY, None),
            ("same chip", KEY, "the user's store has one"),
            ("same chip", other, None),
        ]
    assert {row["gpu"] for row in _shown(capsys, "--gpu", chip)["entries"]} == {Store(folders[0], chip).path.stem}


def test_the_users_store_goes_before_what_is_shipped(folders, capsys):
    for folder in folders:
        Store(folder, GPU).update({KEY: ENTRY})
    Store(folders[1], "AMD MI300X").update({KEY: ENTRY})
    rows = _shown(capsys)["entries"]
    assert [(row["gpu"], row["source"], row["unused"]) for row in rows] == [
        ("NVIDIA_H200", "store", None),
        ("AMD_MI300X", "shipped", None),
        ("NVIDIA_H200", "shipped", "the user's store has one"),
    ]
    assert [row["source"] for row in _shown(capsys, "--gpu", GPU)["entries"]] == ["store", "shipped"]


def test_nothing_tuned_and_a_broken_store(folders, capsys):
    assert main(["show"]) == 0
    assert "Nothing is tuned: every launch uses its kernel's heuristic." in capsys.readouterr().out
    folders[0].mkdir()
    Store(folders[0], GPU).path.write_text('{"schema": 1, "entr')
    assert main(["show", "--gpu", GPU]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing is tuned for NVIDIA H200" in shown
    assert "warning: cannot read tuned configs" in shown


def test_without_triton_it_shows_what_it_can(folders, capsys, monkeypatch):
    Store(folders[0], GPU).update({KEY: ENTRY | {"config": "not a table", "milliseconds": "soon"}})

    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(tunables, "find_tunables", missing)
    assert _shown(capsys)["entries"][0]["unused"] == "Triton is not installed here"
    assert main(["show"]) == 0
    assert "'not a table'" in capsys.readouterr().out


# ---- verify


HERE = torch.device(DEVICE)


class Called(NamedTuple):
    """Stands for a workload: the toy launched on so many pixels; of its blocks 32 is wrong."""

    pixels: int

    def call(self, dtype, device):
        return lambda: TOY(torch.ones(self.pixels, dtype=dtype, device=device), (32,))


def test_every_kernel_that_is_launched_is_registered_and_can_be_verified(store_folders, capsys):
    """The operators that verify runs launch every kernel; a config of each is tried and agrees."""
    known, found = find_tunables(), dict[Any, Any]()
    with kernels.use_backend("triton"), record_launches(), observing(lambda r: found.setdefault(r.launcher, r.problem)):
        for workload in verify.workloads_of(HERE):
            workload.call(torch.float16, HERE)()
    assert {launcher.name for launcher in found} == set(known)
    for launcher, problem in found.items():
        assert known[launcher.name] is launcher
        key = key_of(launcher, problem)
        assert problem_of(launcher, key) == problem
        config = next(config for config in launcher.candidates(problem) if config.valid(problem))
        Store(store_folders[0], gpu_name(HERE)).update({key: entry_of(launcher, config)})
    code = main(["verify", "--json"])
    rows = json.loads(capsys.readouterr().out)["entries"]
    assert {row["key"]: row["reason"] for row in rows if row["status"] != "ok"} == {}
    assert (code, len(rows)) == (0, len(known))


@pytest.fixture
def pixels(folders, monkeypatch):
    """Runs the toy on so many pixels, one launch after the other."""
    return lambda *counts: monkeypatch.setattr(verify, "workloads_of", lambda _device: list(map(Called, counts)))


def _key(count):
    return key_of(TOY, Problem(count))


def test_a_wrong_config_is_found(folders, pixels, capsys):
    right, wrong, wide = (entry_of(TOY, Config(block)) for block in (16, 32, 128))
    store = Store(folders[0], gpu_name(HERE))
    store.update({_key(196): right, _key(49): wrong, _key(25): right | {"source": "0"}, _key(130): wide})
    pixels(20, 49)
    assert main(["verify", "--json"]) == 1
    shown = capsys.readouterr()
    assert "[2/3] toy pixels=49 dtype=float32: failed" in shown.err
    rows = {row["key"]: row for row in json.loads(shown.out)["entries"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        _key(196): "ok",  # on 20 pixels: nothing else has as many
        _key(49): "failed",
        _key(25): "unchecked",
        _key(130): "unchecked",
    }
    assert rows[_key(49)]["reason"].startswith("output 0 is off by 1.0e+00")
    assert rows[_key(130)]["reason"] == "no operator's launch that is tried suits it"
    assert main(["verify"]) == 1
    assert "failed: output 0 is off by 1.0e+00" in " ".join(capsys.readouterr().out.split())
    store.path.unlink()
    assert main(["verify"]) == 0
    assert "nothing to verify" in capsys.readouterr().out
    assert main(["verify", "--gpu", "no such"]) == 0
    assert "Nothing is tuned for no such, so" in capsys.readouterr().out


def test_a_config_is_tried_on_its_own_problem_where_that_is_met(folders, pixels, capsys, monkeypatch):
    Store(folders[0], gpu_name(HERE)).update({_key(49): entry_of(TOY, Config(16))})
    pixels(20, 49, 21)
    monkeypatch.setattr(verify, "check", check := mock.Mock(side_effect=verify.check))
    assert main(["verify", "--json"]) == 0
    assert [call.args[0].problem for call in check.mock_calls] == [Problem(20), Problem(49)]


def test_an_interruption_shows_what_was_checked(folders, pixels, monkeypatch, capsys):
    Store(folders[0], gpu_name(HERE)).update({_key(n): entry_of(TOY, Config(16)) for n in (21, 22)})
    pixels(21, 22)
    agrees = {"status": "ok", "reason": None}  # both on the first launch, and one again on its own problem
    monkeypatch.setattr(verify, "check", mock.Mock(side_effect=[agrees, agrees, KeyboardInterrupt]))
    assert main(["verify", "--json"]) == 130
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["entries"]] == ["ok", "ok"]


def test_shipped_configs_hold_for_the_kernels_as_they_stand():
    """Whoever changes a kernel tunes its entries again, or takes them out: nothing would use them."""
    known = find_tunables()
    for path in Path(choose.__file__).with_name("configs").glob("*.json"):
        for key, entry in json.loads(path.read_text())["entries"].items():
            launcher = known[key.partition(" ")[0]]
            assert entry["source"] == launcher.source, key
            problem = problem_of(launcher, key)
            config = config_of(entry, launcher, problem)
            assert config is not None, key
            assert config.valid(problem), key
