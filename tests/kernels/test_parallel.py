"""Eager calls on several threads: the same results, whoever calls, and the caller's settings as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from kernels import parallel
from kernels.aggregation import eager as algebra
from kernels.windows import Window
from tests.support import DEVICE, random_tensor

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the eager path leaves threads alone")


@pytest.fixture(params=[2, 5])
def threads(request, monkeypatch):
    """Every call, however small, is shared out among so many threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel, "WORTH_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_parts_hold_every_map_once():
    for batch, groups, count in ((1, 1, 4), (3, 5, 4), (8, 2, 5), (0, 3, 2), (2, 64, 7)):
        parts = parallel._parts(batch, groups, count)
        assert 1 <= len(parts) <= max(count, 1)
        maps = [(b, g) for p in parts for b in range(batch)[p.batch] for g in range(groups)[p.groups]]
        assert sorted(maps) == [(b, g) for b in range(batch) for g in range(groups)]


def test_inference_mode_and_other_callers(threads):
    """Workers see the caller's mode; several callers at once keep their own numbers of threads."""
    weight, x = random_tensor(2, 4, 3, 3, 8, 9), random_tensor(2, 4, 5, 8, 9)
    window = Window((3, 3), padding=(1, 1))
    expected = algebra.aggregate(weight, x, window)
    with torch.inference_mode():
        assert torch.equal(algebra.aggregate(weight.clone(), x.clone(), window), expected)
    wrong = []

    def call(own: int) -> None:
        torch.set_num_threads(own)
        same = all(torch.equal(algebra.aggregate(weight, x, window), expected) for _ in range(10))
        if not same or torch.get_num_threads() != own:
            wrong.append(own)

    callers = [threading.Thread(target=call, args=(own,)) for own in (1, 2, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_what_a_worker_raises_is_raised(threads):
    def prepare(part: parallel.Part) -> parallel.Work[None]:
        def fail() -> None:
            raise ArithmeticError(str(part.groups))

        return fail

    with pytest.raises(ArithmeticError, match="slice"):
        parallel.alone(parallel.over_maps)(prepare, random_tensor(1, 6), 100)
    assert torch.get_num_threads() == threads
