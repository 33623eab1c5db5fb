"""``python -m autotune verify``: every kernel's stored configs can be checked, and a wrong one is found."""

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
from kernels.tuning.choose import config_of, gpu_name, key_of, observing
from kernels.tuning.store import Store
from tests.kernels.toy import TOY, Config, Problem, entry_of
from tests.support import DEVICE

HERE = torch.device(DEVICE)


class Called(NamedTuple):
    """Stands for a workload: the toy launched on so many pixels; of its blocks 32 is wrong."""

    pixels: int

    def call(self, dtype, device):
        return lambda: TOY(torch.ones(self.pixels, dtype=dtype, device=device), (32,))


@pytest.fixture(autouse=True)
def folder(store_folders):
    return store_folders[0]


def test_every_kernel_that_is_launched_is_registered_and_can_be_verified(folder, capsys):
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
        Store(folder, gpu_name(HERE)).update({key: entry_of(launcher, config)})
    code = main(["verify", "--json"])
    rows = json.loads(capsys.readouterr().out)["entries"]
    assert {row["key"]: row["reason"] for row in rows if row["status"] != "ok"} == {}
    assert (code, len(rows)) == (0, len(known))


@pytest.fixture
def pixels(monkeypatch):
    """Runs the toy on so many pixels, one launch after the other."""
    monkeypatch.setattr(tunables, "find_tunables", lambda: {"toy": TOY})
    return lambda *counts: monkeypatch.setattr(verify, "workloads_of", lambda _device: list(map(Called, counts)))


def _key(count):
    return key_of(TOY, Problem(count))


def test_a_wrong_config_is_found(folder, pixels, capsys):
    right, wrong, wide = (entry_of(TOY, Config(block)) for block in (16, 32, 128))
    store = Store(folder, gpu_name(HERE))
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


def test_a_config_is_tried_on_its_own_problem_where_that_is_met(folder, pixels, capsys, monkeypatch):
    Store(folder, gpu_name(HERE)).update({_key(49): entry_of(TOY, Config(16))})
    pixels(20, 49, 21)
    monkeypatch.setattr(verify, "check", check := mock.Mock(side_effect=verify.check))
    assert main(["verify", "--json"]) == 0
    assert [call.args[0].problem for call in check.mock_calls] == [Problem(20), Problem(49)]


def test_an_interruption_shows_what_was_checked(folder, pixels, monkeypatch, capsys):
    Store(folder, gpu_name(HERE)).update({_key(n): entry_of(TOY, Config(16)) for n in (21, 22)})
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
