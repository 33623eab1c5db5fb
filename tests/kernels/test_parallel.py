"""Eager calls on several threads: the same results, whoever calls, and the caller's settings as they were."""

from __future__ import annotations

import threading

import pytest
import torch

import kernels
from kernels import parallel
from kernels.aggregation import eager as algebra
from kernels.windows import Window
from tests.support import DEVICE, GRADIENT_TOLERANCE, assert_close, check_operator, random_tensor

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the eager path leaves threads alone")

OPERATORS = {
    "involution2d": ({"x": (2, 6, 8, 9), "weight": (2, 2, 3, 3, 8, 9)}, {}),
    "na2d_qk": ({"query": (2, 3, 8, 9, 4), "key": (2, 3, 8, 9, 4), "rpb": (3, 5, 5)}, {"kernel_size": 3}),
    "na2d_softmax_av": ({"logits": (2, 3, 8, 9, 9), "value": (2, 3, 8, 9, 4), "rpb": (3, 5, 5)}, {"kernel_size": 3}),
    "outlook_attention2d": ({"logits": (3, 4, 5, 2, 9, 9), "value": (3, 8, 9, 6)}, {"stride": 2}),
    "depthwise_conv2d": ({"x": (2, 40, 8, 9), "weight": (40, 1, 5, 5), "bias": (40,)}, {}),
}


@pytest.fixture(params=[2, 5])
def threads(request, monkeypatch):
    """Every call, however small, is shared out among so many threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel, "WORTH_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPERATORS)
def test_shared_out_calls_equal_their_definition(name, threads):
    shapes, options = OPERATORS[name]
    dtype = torch.float32 if name == "depthwise_conv2d" else torch.float64
    inputs = {key: random_tensor(*shape, dtype=torch.float64) for key, shape in shapes.items()}
    check_operator(name, inputs, backend="eager", dtype=dtype, **options)
    assert torch.get_num_threads() == threads


def test_shared_out_contmix_equals_one_thread(threads):
    query, key, value, weight, bias, *rpb = inputs = [
        random_tensor(*shape).requires_grad_()
        for shape in ((2, 3, 4, 8, 9), (2, 3, 4, 5), (2, 2, 3, 4, 8, 9), (34, 5), (34,), (3, 5, 5), (3, 9, 9))
    ]

    def run() -> list[torch.Tensor]:
        with kernels.use_backend("eager"):
            out = kernels.contmix2d(query, key, value, weight, bias, rpb, kernel_sizes=(3, 5))
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    shared, again = run(), run()
    torch.set_num_threads(1)
    for ours, repeated, alone in zip(shared, again, run(), strict=True):
        assert torch.equal(ours, repeated), "the same bits on every run"
        assert_close(ours, alone, GRADIENT_TOLERANCE[torch.float32])


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
    def work(part: parallel.Part) -> parallel.Work[None]:
        yield
        raise ArithmeticError(str(part.groups))

    with pytest.raises(ArithmeticError, match="slice"):
        parallel.alone(parallel.over_maps)(work, random_tensor(1, 6), 100)
    assert torch.get_num_threads() == threads
