"""The store survives what happens to files: races, crashes, corruption, hostility, read-only disks."""

import json
import multiprocessing
import os
import pwd
import warnings
from pathlib import Path

import pytest

from kernels.tuning.store import Store, user_folder

ENTRY = {"config": {"block_pixels": 64}, "triton": "3", "source": "abc"}


def test_round_trip_keeps_other_entries(tmp_path):
    store = Store(tmp_path, "NVIDIA H200")
    assert store.read() == {}
    assert store.update({"b": ENTRY})
    assert store.update({"a": ENTRY | {"milliseconds": 1.5}})
    assert store.read() == {"a": ENTRY | {"milliseconds": 1.5}, "b": ENTRY}
    assert store.path.name == "NVIDIA_H200.json"
    text = store.path.read_text()
    assert text.index('"a"') < text.index('"b"')  # sorted: a tuned file diffs well
    assert json.loads(text)["gpu"] == "NVIDIA H200"


def test_folder_is_overridable(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(tmp_path / "mine"))
    assert user_folder() == tmp_path / "mine"
    monkeypatch.delenv("DYNAMIC_KERNELS_STORE")
    assert user_folder().name == "configs"
    assert "dynamic-kernels" in user_folder().parts


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema": 1, "entries": {"a": ', b"<html>", b"[]", b'{"schema": 99}', b'{"schema": 1, "entries": []}',
     b"\xff\xfe\x00", b"[" * 100_000, b'{"schema": 1, "entries": 3}'],
    ids=["empty", "truncated", "html", "list", "newer schema", "entries list", "binary", "deep", "entries number"],
)  # fmt: skip
def test_a_broken_file_costs_one_warning(tmp_path, content):
    store = Store(tmp_path, "gpu")
    store.path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="cannot read tuned configs at .*gpu.json") as caught:
        assert [store.read(), store.read()] == [{}, {}]
    assert len(caught) == 1
    assert store.update({"a": ENTRY})
    assert store.read() == {"a": ENTRY}
    assert store.path.with_suffix(".json.broken").read_bytes() == content  # nobody's work is thrown away


def test_only_entries_that_are_tables_are_read(tmp_path):
    store = Store(tmp_path, "gpu")
    store.path.write_text(json.dumps({"schema": 1, "entries": {"good": ENTRY, "bad": 3}}))
    assert store.read() == {"good": ENTRY}


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    obstacle = tmp_path / "file"
    obstacle.write_text("a file where the folder should be: fails for root as well")
    store = Store(obstacle / "folder", "gpu")
    with pytest.warns(RuntimeWarning, match="cannot write tuned configs") as caught:
        assert [store.update({"a": ENTRY}), store.update({"a": ENTRY})] == [False, False]
    assert len(caught) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
    store = Store(tmp_path, "gpu")
    os.mkfifo(store.path)
    with pytest.warns(RuntimeWarning, match="not a file"):
        assert store.read() == {}


@pytest.mark.parametrize("old", [False, True])
def test_without_a_home_directory_nothing_is_kept_and_nothing_fails(old, monkeypatch):
    for name in ("DYNAMIC_KERNELS_STORE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    if old:  # that of setuptools, which is found once PyTorch has compiled something
        monkeypatch.setattr("kernels.tuning.store._cache_folder", lambda: Path("~/.cache/dynamic-kernels"))
    store = Store(user_folder(), "gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read() == {}
    with pytest.warns(RuntimeWarning, match="cannot write.*no home directory; set DYNAMIC_KERNELS_STORE"):
        assert not store.update({"a": ENTRY})


def _write(folder, worker, count):
    store = Store(folder, "gpu")
    for i in range(count):
        assert store.update({f"{worker} {i}": ENTRY})


def test_eight_processes_lose_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(tmp_path, worker, 6)) for worker in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert set(Store(tmp_path, "gpu").read()) == {f"{worker} {i}" for worker in range(8) for i in range(6)}
