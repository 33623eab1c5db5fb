"""The store survives what happens to files: races, crashes, corruption, hostility, read-only disks."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from kernels.tuning.store import Store, atomic_write, user_folder

ROOT = Path(__file__).parents[2]
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


def test_entries_that_are_no_tables_are_passed_over(tmp_path):
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


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    atomic_write(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


WRITER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from kernels.tuning.store import Store
store = Store(Path({folder!r}), "gpu")
for i in range({count}):
    assert store.update({{f"{worker} {{i}}": {{"config": {{}}, "triton": "3", "source": "abc"}}}})
"""


def _writer(folder, worker, count):
    code = WRITER.format(root=str(ROOT), folder=str(folder), worker=worker, count=count)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    store = Store(tmp_path, "GPU")
    store.update({"a": {"config": {}}})
    (tmp_path / ".GPU.json.abc.tmp").write_text('{"schema": 1, "entr')
    store.update({"b": {"config": {}}})
    assert set(store.read()) == {"a", "b"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_eight_processes_lose_nothing(tmp_path):
    writers = [_writer(tmp_path, worker, 6) for worker in range(8)]
    assert [writer.communicate(timeout=120)[1] for writer in writers] == [""] * 8
    assert set(Store(tmp_path, "gpu").read()) == {f"{worker} {i}" for worker in range(8) for i in range(6)}


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    for attempt in range(3):
        writer = _writer(tmp_path, f"victim {attempt}", 100_000)
        store = Store(tmp_path, "gpu")
        deadline = time.monotonic() + 60
        while not any(key.startswith(f"victim {attempt}") for key in store.read()) and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before = store.read()
            assert any(key.startswith(f"victim {attempt}") for key in before)
            assert store.update({f"survivor {attempt}": ENTRY})  # the dead writer's lock died with it
        assert set(before) < set(store.read())
