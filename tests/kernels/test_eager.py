"""The eager path beyond the rules for every operator: how it cuts maps, what memory it takes, routes, threads."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.timing import peak_memory
from kernels import parallel
from kernels.aggregation import eager as algebra
from kernels.aggregation.eager_tiles import cut
from kernels.neighborhood import eager as neighborhood
from kernels.windows import Window
from tests.kernels import rules
from tests.kernels.operators import OPERATOR, depthwise
from tests.support import DEVICE, random_tensor


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cuts_state_the_window_rules(data):
    """Every output lies in exactly one tile, and the tiles' runs give back its neighbours."""
    kernel_size, dilation = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        window = Window.neighborhood((kernel_size, 1), (dilation, 1))
        length = kernel_size * dilation + data.draw(st.integers(0, 12))
    else:
        stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 8))
        window = Window((kernel_size, 1), (stride, 1), (padding, 0), (dilation, 1))
        length = max(1, dilation * (kernel_size - 1) + 1 - 2 * padding) + data.draw(st.integers(0, 12))
    neighbours = window.neighbours(length, 0)
    found = {}
    for tiles in cut(window, length, 0, data.draw(st.integers(1, 9)), data.draw(st.booleans())):
        outputs = iter(range(*tiles.outputs.indices(len(neighbours))))
        for begin, (part, axis) in zip(tiles.begins, tiles.inside(length), strict=True):
            positions = [begin + at * tiles.dilation for at in range(tiles.span)]
            assert positions[part] == list(range(*axis.indices(length))), "what is not padding"
            assert len(positions[part]) == sum(0 <= position < length for position in positions)
            for index, output in zip(tiles.index, outputs, strict=False):
                assert output not in found
                found[output] = [positions[at] for at in index]
        assert next(outputs, None) is None
    assert [found[output] for output in range(len(neighbours))] == neighbours.tolist()


def _peak(call: Callable[[], object]) -> int:
    """The most bytes alive at one moment of the call, its outputs included, beyond those alive before it."""
    found = peak_memory(call, torch.device(DEVICE))
    assert found is not None
    return found


@pytest.mark.skipif(DEVICE != "cpu", reason="the bound is the CPU's: elsewhere a step may hold more")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_peak_memory_of_involution(channels, size, batch):
    """At RedNet-50's stages, everything that lives at once is at most twice the inputs plus the output."""
    window = Window((7, 7), padding=(3, 3))
    x = random_tensor(batch, channels // 16, 16, size, size)
    weight = random_tensor(batch, channels // 16, 7, 7, size, size)
    calls = {
        "aggregate": (lambda: algebra.aggregate(weight, x, window), x),
        "correlate": (lambda: algebra.correlate(x, x, window), weight),
        "transpose": (lambda: algebra.transpose(weight, x, (size, size), window), x),
    }
    for name, (call, out) in calls.items():
        # As much as the inputs once more, beside the output; the backward pass has them all, too.
        assert _peak(call) <= out.nbytes + x.nbytes + weight.nbytes, name


@pytest.mark.skipif(DEVICE != "cpu", reason="the bound is the CPU's: elsewhere a step may hold more")
def test_peak_memory_of_a_dense_prediction_map():
    """K = 13 on 50x80: the gathered neighbourhoods would be 346 MB; the operator takes its outputs and 40 MB."""
    window, spare = Window.neighborhood((13, 13)), 40e6
    logits = random_tensor(1, 8, 50, 80, 13, 13).permute(0, 1, 4, 5, 2, 3)
    value, rpb = random_tensor(1, 8, 16, 50, 80), random_tensor(8, 25, 25)
    out, log_sum_exp = neighborhood.softmax_aggregate(logits, value, rpb, window)
    peak = _peak(lambda: neighborhood.softmax_aggregate(logits, value, rpb, window))
    assert peak <= out.nbytes + log_sum_exp.nbytes + spare
    backward = (value, logits, value, rpb, out, log_sum_exp, window)
    assert _peak(lambda: neighborhood.softmax_aggregate_backward(*backward)) <= logits.nbytes + value.nbytes + spare


# The table holds maps with channels first. With channels last K chooses between PyTorch's own convolution (3), oneDNN's
# (7, 15, 17) and a weight that is padded to 15 (13).
@pytest.mark.parametrize("kernel_size", [3, 7, 13, 15, 17])
def test_channels_last_routes_of_depthwise_convolution(kernel_size):
    operator = OPERATOR["depthwise_conv2d"].at(depthwise((9, 12), 20, kernel_size))
    tensors = operator.tensors(batch=2)
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    rules.check(operator, tensors, "eager")
    out, _ = rules.run(operator, tensors, "eager")
    assert out.is_contiguous(memory_format=torch.channels_last)


# ---- on several threads: the same results, whoever calls, and the caller's settings as they were


ON_THREADS = pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the eager path leaves threads alone")


@pytest.fixture(params=[2, 5])
def threads(request, monkeypatch):
    """Every eager call, however small, is shared out among so many threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel, "WORTH_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@ON_THREADS
@rules.BY_NAME
def test_threads_change_nothing(operator, threads):
    """The same bits every time, and the caller's setting stays."""
    tensors = operator.tensors(batch=3)
    rules.check(operator, tensors, "eager")
    (out, grads), (again, grads_again) = (rules.run(operator, tensors, "eager") for _ in range(2))
    assert torch.get_num_threads() == threads
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, grads_again))


@ON_THREADS
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


@ON_THREADS
def test_what_a_worker_raises_is_raised(threads):
    def fail(part: parallel.Part) -> None:
        raise ArithmeticError(str(part.groups))

    with pytest.raises(ArithmeticError, match="slice"):
        parallel.alone(parallel.over_maps)(fail, random_tensor(1, 6), 100)
    assert torch.get_num_threads() == threads
