"""``python -m autotune show``: every entry, whether launches use it, and if not, why."""

import json

import pytest

from autotune import tunables
from autotune.__main__ import main
from kernels.tuning import choose
from kernels.tuning.store import Store

GPU = "NVIDIA H200"
KEY = "gather.aggregate channels=16 pixels=196 steps=49 kernel_fastest=False channels_fastest=False dtype=bfloat16"


pytestmark = pytest.mark.usefixtures("store_folders")


def _entry(**changes):
    aggregate = tunables.find_tunables()["gather.aggregate"]
    return {
        "config": {"block_pixels": 64, "block_channels": 16, "block_steps": 1, "num_warps": 4, "num_stages": 2},
        "triton": choose.triton_version(),
        "source": aggregate.source,
        "milliseconds": 0.25,
        "heuristic_milliseconds": 0.5,
    } | changes


def _shown(capsys, *arguments):
    assert main(["show", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_reason_not_to_use_an_entry_is_named(store_folders, capsys):
    invalid = {"block_pixels": 128, "block_channels": 16, "block_steps": 1, "num_warps": 4, "num_stages": 2}
    expected = {
        KEY: (_entry(), None),
        KEY.replace("196", "784"): (_entry(triton="3.0"), f"tuned with triton 3.0, this is {choose.triton_version()}"),
        KEY.replace("196", "1024"): (_entry(source="0"), "the kernel's code has changed since"),
        KEY.replace("196", "49"): (_entry(config={"block_pixels": 7}), "the kernel offers no such config"),
        KEY.replace("196", "16"): (_entry(config=invalid), "the config is not valid for this problem"),
        "scatter channels=16 pixels=49": (_entry(), "there is no such kernel"),
        "gather.aggregate channels=many pixels=49": (
            _entry(),
            "does not name a problem of the kernel",
        ),
        KEY.replace("196", "1000"): (_entry(), "is not how the kernel gather.aggregate writes this problem"),
    }
    Store(store_folders[0], GPU).update({key: entry for key, (entry, _) in expected.items()})
    shown = _shown(capsys)
    assert shown["folders"]["store"] == str(store_folders[0])
    found = {row["key"]: row["unused"] for row in shown["entries"]}
    assert set(found) == set(expected)
    for key, (_, reason) in expected.items():
        assert found[key] == reason or reason in found[key]
    assert {row["gpu"] for row in shown["entries"]} == {"NVIDIA_H200"}


def test_the_users_store_goes_before_what_is_shipped(store_folders, capsys):
    for folder in store_folders:
        Store(folder, GPU).update({KEY: _entry()})
    Store(store_folders[1], "AMD MI300X").update({KEY: _entry()})
    rows = _shown(capsys)["entries"]
    assert [(row["gpu"], row["source"], row["unused"]) for row in rows] == [
        ("NVIDIA_H200", "store", None),
        ("AMD_MI300X", "shipped", None),
        ("NVIDIA_H200", "shipped", "the user's store has one"),
    ]
    assert [row["source"] for row in _shown(capsys, "--gpu", GPU)["entries"]] == ["store", "shipped"]


def test_the_table_and_the_path(store_folders, capsys):
    Store(store_folders[0], GPU).update({KEY: _entry(), KEY.replace("196", "784"): _entry(source="0")})
    assert main(["show"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "used │ 0.2500 │ 0.5000" in shown
    assert "not used: the" in shown
    assert f"store: {store_folders[0]}" in shown


def test_nothing_tuned_and_a_broken_store(store_folders, capsys):
    assert main(["show"]) == 0
    assert "Nothing is tuned: every launch uses its kernel's heuristic." in capsys.readouterr().out
    store_folders[0].mkdir()
    Store(store_folders[0], GPU).path.write_text('{"schema": 1, "entr')
    assert main(["show", "--gpu", GPU]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing is tuned for NVIDIA H200" in shown
    assert "warning: cannot read tuned configs" in shown


def test_what_no_launch_can_use_is_shown_with_the_reason(store_folders, capsys):
    store = Store(store_folders[0], GPU)
    keys = [KEY.replace("196", "0"), KEY.replace("=16", "=0"), KEY.replace("=16", "=-" + "9" * 3000), "", "[red]line\n"]
    store.update({key: _entry(milliseconds=float("inf"), heuristic_milliseconds=10**400) for key in keys})
    store.update({"nan": _entry(config={"block": float("nan")}, milliseconds=True)})
    rows = {row["key"]: row for row in _shown(capsys)["entries"]}
    assert set(rows) == {*keys, "nan"}
    assert rows[keys[0]]["milliseconds"] == float("inf")
    assert "the config is not valid for this problem" in rows[keys[1]]["unused"]
    assert all(row["unused"] for row in rows.values())
    assert main(["show"]) == 0
    assert "[red]line" in capsys.readouterr().out


def test_without_triton_it_shows_what_it_can(store_folders, capsys, monkeypatch):
    Store(store_folders[0], GPU).update({KEY: _entry(config="not a table", milliseconds="soon")})

    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(tunables, "find_tunables", missing)
    assert _shown(capsys)["entries"][0]["unused"] == "Triton is not installed here"
    assert main(["show"]) == 0
    assert "'not a table'" in capsys.readouterr().out
