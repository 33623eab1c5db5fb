"""The store survives what happens to files: races, crashes, corruption, hostility, read-only disks; what launches take
from it."""

import importlib
import json
import multiprocessing
import os
import pwd
import warnings
from pathlib import Path

import pytest
import torch

from kernels.tuning import choose
from kernels.tuning.choose import bucket, key_of, look_up
from kernels.tuning.source import jit_code, modules_of
from kernels.tuning.store import Store, user_folder
from tests.kernels.toy import GPU, TOY, Config, Problem, entry_of

pytestmark = pytest.mark.usefixtures("store_folders")

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


# ---- which config a launch uses: look-up order, exact keys, what voids an entry


def _entry(block, **changes):
    return entry_of(TOY, Config(block), **changes)


def test_store_before_shipped_before_heuristic(tmp_path):
    problem = Problem(100)
    assert look_up(TOY, problem, GPU) == (Config(16), "heuristic")
    Store(tmp_path / "shipped", GPU).update({key_of(TOY, problem): _entry(32)})
    choose.forget()
    assert look_up(TOY, problem, GPU) == (Config(32), "shipped")
    Store(user_folder(), GPU).update({key_of(TOY, problem): _entry(64)})
    choose.forget()
    assert look_up(TOY, problem, GPU) == (Config(64), "store")
    assert look_up(TOY, Problem(100, torch.float16), GPU).source == "heuristic"
    assert look_up(TOY, problem, "another GPU").source == "heuristic"


def test_configs_of_the_same_chip_hold_until_a_gpu_is_tuned(tmp_path):
    problem, (gpu, chip) = Problem(100), next(iter(choose.SAME_CHIP.items()))
    Store(tmp_path / "shipped", chip).update({key_of(TOY, problem): _entry(32)})
    choice = look_up(TOY, problem, gpu)
    assert choice == (Config(32), "same chip")
    assert not choice.tuned
    Store(user_folder(), gpu).update({key_of(TOY, problem): _entry(64)})
    choose.forget()
    assert look_up(TOY, problem, gpu) == (Config(64), "store")
    assert look_up(TOY, problem, gpu).tuned


def test_neighbouring_large_maps_share_and_small_ones_do_not():
    assert bucket(3136) == bucket(3000) == 4096
    assert bucket(257) == 512
    assert [bucket(n) for n in (49, 196, 256)] == [49, 196, 256]
    assert key_of(TOY, Problem(3000)) == key_of(TOY, Problem(3136)) != key_of(TOY, Problem(5000))
    assert key_of(TOY, Problem(49)) == "toy pixels=49 dtype=float32"


def test_candidates_begin_with_the_heuristic_and_are_limited():
    assert [c.block for c in TOY.candidates(Problem(100))] == [16, 8, 32, 64]
    assert [c.block for c in TOY.candidates(Problem(100), most=2)] == [16, 8]


def test_comments_and_docstrings_do_not_void_an_entry(tmp_path, monkeypatch):
    """Code that runs on the host does not either: its outputs are checked anew at every use."""
    pytest.importorskip("triton")
    head = "import triton\nimport triton.language as tl\nSIZE = tl.constexpr({size})\n\n\n"
    kernel = '@triton.jit\ndef f(x):\n    """{words}"""{comment}\n    return x + {number}\n\n\n'
    host_code = "def launch():\n    return {host}\n"
    monkeypatch.syspath_prepend(tmp_path)

    def code(module, size=8, words="One.", comment="", number=1, host=0):
        values = {"words": words, "comment": comment, "number": number, "host": host}
        (tmp_path / f"{module}.py").write_text((head + kernel + host_code).format(size=size, **values))
        importlib.import_module(module)
        return list(jit_code(module))

    first = code("kernels_a")
    assert code("kernels_b", words="Other\n    words.", comment="  # and more", host=3) == first
    assert code("kernels_c", number=2) != first
    assert code("kernels_d", size=9) != first


def test_an_entry_depends_on_all_code_that_its_launches_run():
    importlib.import_module("kernels.aggregation.correlate")
    found = modules_of("kernels.aggregation.correlate")
    assert found == {"kernels.aggregation.correlate", "kernels.aggregation.tiles"}


def test_what_a_look_up_would_refuse_is_no_candidate():
    assert TOY.candidates(Problem(8)) == [Config(8)]  # the heuristic's tile is larger than the map
    assert TOY.candidates(Problem(4)) == [Config(16)]  # nothing is valid: better than nothing


def test_a_config_is_looked_up_once(monkeypatch):
    """A launch like an earlier one reads no file and asks no heuristic."""
    asked = []
    monkeypatch.setattr(TOY, "heuristic", lambda problem: asked.append(problem) or Config(16))
    assert [TOY.choose(torch.ones(100)).block for _ in range(3)] == [16, 16, 16]
    assert asked == [Problem(100)]
