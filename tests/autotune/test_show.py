"""``python -m autotune show``: every entry, whether launches use it, and if not, why."""

import json

import pytest

from autotune import tunables
from autotune.__main__ import main
from kernels.tuning.choose import key_of, look_up, triton_version
from kernels.tuning.store import Store
from tests.kernels.toy import TOY, Config, Problem, entry_of

GPU = "NVIDIA H200"
ENTRY = entry_of(TOY, Config(64))
KEY = key_of(TOY, Problem(196))


@pytest.fixture(autouse=True)
def folders(store_folders, monkeypatch):
    monkeypatch.setattr(tunables, "find_tunables", lambda: {"toy": TOY})
    return store_folders


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
