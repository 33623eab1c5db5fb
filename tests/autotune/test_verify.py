"""``python -m autotune verify``: every kernel's stored configs can be checked, and a wrong one is found."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import kernels
from autotune import tunables, verify, workloads
from autotune.__main__ import main
from autotune.tunables import StoredEntry, find_tunables, problem_of
from kernels.launch import record_launches
from kernels.tuning import choose
from kernels.tuning.choose import config_of, gpu_name, key_of, observing, triton_version
from kernels.tuning.store import Store
from tests.kernels.toy import TOY, Config, Problem, toy
from tests.support import DEVICE

HERE = torch.device(DEVICE)
CHECKED = toy(TOY.configs)
CHECKED.example(lambda problem, device: (torch.ones(problem.pixels, device=device), (32,)))  # 32 is wrong


@pytest.fixture(autouse=True)
def folder(store_folders, monkeypatch):
    monkeypatch.setattr(verify, "find_tunables", lambda: {"toy": CHECKED})
    return store_folders[0]


def _entry(launcher, config):
    return {"config": dataclasses.asdict(config), "triton": triton_version(), "source": launcher.source}


def _problems():
    """One problem per kernel that the operators launch, from tiny shapes with own, shared and very large windows."""
    found = {}
    shared = [workloads.neighborhood(name, "tiny", 1, 2, 16, (5, 5), 5) for name in ("na2d_av", "na2d_softmax_av")]
    shared.append(workloads.involution("tiny", 1, 16, (5, 5), 17, 16))  # too large for rows to slide
    shared.append(workloads.contmix("tiny", 1, 2, 16, (5, 5), (3, 5), context=9))
    with kernels.use_backend("triton"), record_launches(), observing(lambda r: found.setdefault(r.launcher, r.problem)):
        for workload in (*workloads.benchmark_workloads(quick=True), *shared):
            inputs = workload.draw_inputs(torch.float32, HERE)
            workload.run(inputs, workload.draw_gradient(torch.float32, HERE))
    return found


def test_every_kernel_that_is_launched_is_registered_and_can_be_verified():
    known, problems = find_tunables(), _problems()
    assert {launcher.name for launcher in problems} == set(known)
    for launcher, problem in problems.items():
        assert known[launcher.name] is launcher
        key = key_of(launcher, problem)
        assert problem_of(launcher, key) == problem
        config = next(config for config in launcher.candidates(problem) if config.valid(problem))
        stored = StoredEntry("cpu", "store", tunables.user_folder(), key, _entry(launcher, config))
        row = verify.check_entry(stored, known, HERE)
        assert row["status"] == "ok", f"{key}: {row['reason']}"


def test_a_wrong_config_is_found(folder, capsys):
    def key(pixels):
        return key_of(CHECKED, Problem(pixels))

    right, wrong = (_entry(CHECKED, Config(block)) for block in (16, 32))
    store = Store(folder, gpu_name(HERE))
    store.update({key(196): right, key(49): wrong, key(25): right | {"source": "0"}})
    assert main(["verify", "--json"]) == 1
    shown = capsys.readouterr()
    assert "[3/3] toy pixels=49 dtype=float32: failed" in shown.err
    rows = {row["key"]: row for row in json.loads(shown.out)["entries"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        key(196): "ok",
        key(25): "unchecked",
        key(49): "failed",
    }
    assert rows[key(49)]["reason"].startswith("output 0 is off by 1.0e+00")
    assert main(["verify"]) == 1
    assert "failed: output 0 is off by 1.0e+00" in " ".join(capsys.readouterr().out.split())
    store.path.unlink()
    assert main(["verify"]) == 0
    assert "nothing to verify" in capsys.readouterr().out


def test_a_kernel_without_an_example_is_named_not_failed(folder, monkeypatch, capsys):
    Store(folder, gpu_name(HERE)).update({key_of(TOY, Problem(49)): _entry(TOY, Config(16))})
    monkeypatch.setattr(verify, "find_tunables", lambda: {"toy": TOY})
    assert main(["verify", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["entries"]
    assert (row["status"], row["reason"]) == ("unchecked", "the kernel offers no example to check it with")


def test_an_interruption_shows_what_was_checked(folder, monkeypatch, capsys):
    Store(folder, gpu_name(HERE)).update({key_of(TOY, Problem(n)): _entry(TOY, Config(16)) for n in (21, 22)})
    check_entry = verify.check_entry

    def interrupted(stored, known, device):
        if "pixels=22" in stored.key:
            raise KeyboardInterrupt
        return check_entry(stored, known, device)

    monkeypatch.setattr(verify, "check_entry", interrupted)
    assert main(["verify", "--json"]) == 130
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["entries"]] == ["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_gpu_and_interpreter_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(verify, "interpreting", lambda: False)
    assert main(["verify"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


def test_shipped_configs_hold_for_the_kernels_as_they_stand():
    """Whoever changes a kernel tunes its entries again or takes them out, since nothing would use them."""
    known = find_tunables()
    for path in Path(choose.__file__).with_name("configs").glob("*.json"):
        for key, entry in json.loads(path.read_text())["entries"].items():
            launcher = known[key.partition(" ")[0]]
            assert entry["source"] == launcher.source, key
            problem = problem_of(launcher, key)
            config = config_of(entry, launcher, problem)
            assert config is not None, key
            assert config.valid(problem), key
