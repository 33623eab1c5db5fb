"""Which config a launch uses: look-up order, exact keys, what voids an entry."""

import importlib

import pytest
import torch

from kernels.tuning import choose
from kernels.tuning.choose import bucket, key_of, look_up
from kernels.tuning.source import jit_code, modules_of
from kernels.tuning.store import Store, user_folder
from tests.kernels.toy import GPU, TOY, Config, Problem, entry_of

pytestmark = pytest.mark.usefixtures("store_folders")


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
