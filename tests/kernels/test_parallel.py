"""Eager calls on several threads: the same results, whoever calls, and the caller's settings as they were."""

import threading

import pytest
import torch

from kernels import parallel
from kernels.aggregation import eager as algebra
from kernels.windows import Window
from tests.kernels.rules import BY_NAME, check, run
from tests.support import DEVICE, random_tensor

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the eager path leaves threads alone")


@BY_NAME
def test_every_operator(operator, threads):
    """The same bits every time, and the caller's setting stays."""
    tensors = operator.tensors(batch=3)
    check(operator, tensors, "eager")
    (out, grads), (again, grads_again) = (run(operator, tensors, "eager") for _ in range(2))
    assert torch.get_num_threads() == threads
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, grads_again))


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
    def fail(part: parallel.Part) -> None:
        raise ArithmeticError(str(part.groups))

    with pytest.raises(ArithmeticError, match="slice"):
        parallel.alone(parallel.over_maps)(fail, random_tensor(1, 6), 100)
    assert torch.get_num_threads() == threads
