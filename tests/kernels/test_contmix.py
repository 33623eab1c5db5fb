"""contmix2d beyond the rules for every operator: its forms, what it stores, what rounding and NaN do."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.contmix import backward_band, eager, parts, passes
from kernels.launch import record_launches
from kernels.tuning.choose import Request, observing
from tests.kernels.operators import OPERATOR, contmix
from tests.kernels.rules import check
from tests.support import FORWARD_TOLERANCE, assert_close, random_tensor, relative_error

ROW = OPERATOR["contmix2d"]


def _contmix(size=(8, 7), groups=2, context=6, kernel_sizes=(3, 5)):
    """The operator at that shape, and float32 tensors for it."""
    operator = ROW.at(contmix(size, groups, 3, 5, context, kernel_sizes))
    return operator, operator.tensors()


class _LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.fixture(params=[True, False], ids=["shared windows", "own windows"])
def shared(request, monkeypatch):
    """The form of all kernel sizes."""
    monkeypatch.setattr(passes, "shares_windows", lambda *_: request.param)


@pytest.mark.parametrize("size", [11, 19])
@pytest.mark.usefixtures("shared")
def test_windows_of_many_blocks(size):
    """A shared window of six blocks of positions and two tiles of outputs; and own windows, one row after the other."""
    check(*_contmix((size, size + 1), groups=1, kernel_sizes=(size,)), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "pitch"), [(8, 16), (8, 17), (10, 20), (16, 32)])
def test_channels_last_at_any_pitch(channels, pitch, dtype):
    """Kernels read 8 channels at once, or 16 of float32; maps of another pitch or number of channels are copied."""
    operator = ROW.at(contmix((6, 7), 2, channels, channels, 6, (3, 5)))
    tensors = operator.tensors(dtype=dtype)
    for name, sizes in (("query", ()), ("value", (2,))):
        last = random_tensor(1, 6, 7, *sizes, pitch, dtype=dtype)[..., -2 * channels :].unflatten(-1, (2, channels))
        tensors[name] = last.movedim((1, 2), (-2, -1))
        fits = not any(number % (8 if dtype == torch.float16 else 16) for number in (channels, pitch))
        assert (passes.as_read(tensors[name]) is tensors[name]) == fits  # the interpreter would read others, too
    check(operator, tensors, "triton")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("norm", "kernel_sizes", "context"), [(1.0, (1, 5), 1), (30.0, (3, 7), 1), (1e3, (1, 7), 6)])
def test_rounding_is_no_more_than_the_definitions_own(norm, kernel_sizes, context, dtype, backend):
    """With large logits the error of 16-bit inputs is at most that of the definition in 16 bits."""
    operator, tensors = _contmix((7, 8), context=context, kernel_sizes=kernel_sizes)
    for name in ("query", "key"):
        tensors[name] *= norm / tensors[name].norm()
    ours = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected, _ = operator.exact(ours)
    naive = relative_error(operator(ours, kernels.reference), expected)
    with kernels.use_backend(backend):
        assert_close(operator(ours), expected, max(FORWARD_TOLERANCE[dtype], naive))


@pytest.mark.parametrize(("dtype", "small_map", "most"), [(torch.float16, 0, 1 << 24), (torch.bfloat16, 10**6, 1)])
@pytest.mark.parametrize(
    ("size", "kernel_size", "masked"),
    [((31, 33), 5, False), ((9, 12), 7, False), ((25, 9), 9, True), ((13, 30), 13, False), ((17, 16), 15, True)],
)
def test_bands(size, kernel_size, masked, dtype, small_map, most, monkeypatch):
    """Several tiles along both axes, windows that begin alike at borders; a bias of -inf leaves a position nothing. All
    heads at once, or one after the other."""
    monkeypatch.setattr(passes, "shares_windows", lambda *_: False)
    monkeypatch.setattr(backward_band, "SMALL_MAP", small_map)
    monkeypatch.setattr(parts, "MOST_STORED", most)
    operator = ROW.at(contmix(size, 3, 14, 10, 6, (kernel_size,)))
    tensors = operator.tensors(dtype=dtype)
    if masked:
        tensors["proj_bias"][::3] = -math.inf
    met: list[Request] = []
    with observing(met.append):
        check(operator, tensors, "triton")
    names = [request.launcher.name for request in met]
    assert names == ["contmix.band", "contmix.band.grad_logits"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("shared")
def test_outputs_that_fill_a_tile_are_finite(dtype):
    """Where all logits are -100 or less, outputs that only fill a tile, and have no softmax, must not overflow."""
    operator = ROW.at(contmix((4, 4), 1, 1, 1, 1, (3,)))
    ours = {name: torch.ones_like(tensor) for name, tensor in operator.tensors(dtype=dtype).items()}
    factors = {"proj_weight": -100, "proj_bias": 0, "rpb[0]": 0}
    ours = {name: (factors.get(name, 1) * tensor).requires_grad_() for name, tensor in ours.items()}
    with kernels.use_backend("triton"):
        out = operator(ours)
        grads = torch.autograd.grad(1000 * out.sum(), tuple(ours.values()))
    assert_close(out, torch.ones_like(out).double(), ROW.rounding * FORWARD_TOLERANCE[dtype])
    for name, grad in zip(ours, grads, strict=True):
        assert grad.isfinite().all(), name


def _largest_share(run, device, dtype, heads, size, backward=True):
    """Elements of the largest tensor over the number of logits, with K = 13."""
    shapes = (1, heads, 16, *size), (1, heads, 16, 169), (169,), (heads, 25, 25), (1, 1, heads, 16, *size)
    query, projected, bias, rpb, value = (torch.ones(shape, device=device, dtype=dtype) for shape in shapes)
    with _LargestTensor() as seen:
        out, statistics = run.contmix(query, projected, bias, [rpb], value, [13])
        if backward:
            run.contmix_backward(out, query, projected, bias, [rpb], value, out, statistics, [13])
    return seen.elements / (heads * math.prod(size) * 169)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_stored_whole(dtype):
    """A 200x320 map with eight heads has 86 million logits; no tensor of the kernels comes near that."""
    with record_launches():  # sizes are all that is asked for
        assert _largest_share(passes, "meta", dtype, 8, (200, 320), backward=False) <= 1 / 8
        assert _largest_share(passes, "meta", dtype, 8, (200, 320)) <= 1 / 4


def test_eager_logits_are_never_stored_whole():
    """Values of overlapping tiles, more than twice the map, are the most."""
    assert _largest_share(eager, "cpu", torch.float32, 1, (200, 320)) <= 1 / 4
