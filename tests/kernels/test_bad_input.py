"""Everything wrong is refused before anything runs, by a message that names the argument and what came."""

import itertools
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import zeros

import kernels
from kernels.launch import launch, record_launches
from kernels.windows import Pair
from tests.kernels.operators import MAP, OPERATOR, OPERATORS
from tests.kernels.row import Operator
from tests.support import DEVICE, random_tensor


def _good(operator: Operator) -> dict[str, Any]:
    return operator.arguments({name: zeros(t.shape) for name, t in operator.tensors(batch=2, device="meta").items()})


# Per operator: argument -> good value. Each bad case replaces some of them.
GOOD = {operator.name: _good(operator) for operator in OPERATORS}

# (operator, replaced arguments, error, what the message must name)
BAD = [
    ("involution2d", {"weight": zeros(2, 4, 3, 3, 5, 4)}, ValueError, "weight has 4 groups"),
    (
        "involution2d",
        {"weight": zeros(2, 2, 4, 4, 5, 4)},
        ValueError,
        r"weight must .* an even kernel size, .*\(4, 4\)",
    ),
    ("involution2d", {"padding": 0, "dilation": 3}, ValueError, "does not fit x"),
    ("involution2d", {"dilation": 2**30}, ValueError, r"padding must keep x .* below 2\^31"),
    ("involution2d_generate", {"groups": 4}, ValueError, "groups must divide the 6 channels"),
    ("involution2d_generate", {"kernel_size": (3, 4)}, ValueError, r"features must .* an even kernel size, .*\(3, 4\)"),
    ("na2d_av", {"kernel_size": 4}, ValueError, "kernel_size must be odd"),
    ("na2d_av", {"kernel_size": 5, "attn": zeros(2, 2, 5, 4, 25)}, ValueError, "needs a map of width at least 5"),
    ("na2d_av", {"dilation": 2}, ValueError, "kernel_size 3 with dilation 2 needs a map"),
    ("contmix2d", {"kernel_sizes": (3, 4)}, ValueError, r"kernel_sizes\[1\] must be odd"),
    ("contmix2d", {"kernel_sizes": 3}, TypeError, "kernel_sizes must be a non-empty sequence"),
    ("contmix2d", {"kernel_sizes": ((3, 5), (5, 3))}, TypeError, r"kernel_sizes\[0\] must be an int, got \(3, 5\)"),
    ("contmix2d", {"rpb": zeros(3, 5, 5)}, TypeError, "rpb must be a sequence"),
    ("contmix2d", {"rpb": [zeros(3, 5, 5)]}, ValueError, "rpb must hold one tensor per kernel size"),
    ("contmix2d", {"rpb": [zeros(2, 1, 1), zeros(2, 3, 3)]}, ValueError, r"rpb\[1\] must have shape"),
    ("contmix2d", {"rpb": [zeros(2, 1, 1), None]}, TypeError, r"rpb\[1\] must be a torch.Tensor, got NoneType"),
    ("outlook_attention2d", {"logits": zeros(2, 3, 2, 4, 9, 9)}, ValueError, "logits have 4 heads"),
    ("outlook_attention2d", {"kernel_size": 2}, ValueError, r"logits must have shape .*, targets=4, sources=4\]"),
    ("outlook_attention2d", {"stride": (2, 2)}, TypeError, "stride must be an int"),
    ("outlook_attention2d", {"scale": "1"}, TypeError, "scale must be a real number"),
    ("outlook_attention2d", {"scale": torch.ones(())}, TypeError, "scale must be a real number"),
    ("outlook_attention2d", {"scale": float("nan")}, ValueError, "scale must be finite"),
    ("depthwise_conv2d", {"weight": zeros(6, 1, 4, 4)}, ValueError, "weight must have an odd kernel size"),
    ("depthwise_conv2d", {"weight": zeros(6, 1, 33, 33)}, ValueError, "weight must have a kernel size of at most 31"),
]


@pytest.mark.parametrize(("operator", "replaced", "error", "message"), BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_refused(operator, replaced, error, message):
    with pytest.raises(error, match=message):
        getattr(kernels, operator)(**(GOOD[operator] | replaced))


TENSORS = [(op, name) for op, good in GOOD.items() for name, value in good.items() if isinstance(value, torch.Tensor)]


# The integers and pairs that operators take, and the least that each may be.
OPTIONS = {
    (operator, name): int(name != "padding")
    for operator in GOOD
    for name, kind in get_type_hints(getattr(kernels, operator)).items()
    if kind in (int, int | Pair, int | Pair | None)
}


@pytest.mark.parametrize(("operator", "name"), OPTIONS)
def test_every_option_is_an_int_within_bounds(operator, name):
    for bad in (1.5, True, "1", np.float32(1), torch.tensor(1), (1, True), (1, 1, 1)):
        with pytest.raises(TypeError, match=f"^{name} must be an int"):
            getattr(kernels, operator)(**(GOOD[operator] | {name: bad}))
    least = OPTIONS[operator, name]
    for bad in (least - 1, -3, 2**31, 2**40):
        with pytest.raises(ValueError, match=rf"^{name} must be at least {least} and below 2\^31"):
            getattr(kernels, operator)(**(GOOD[operator] | {name: bad}))


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_every_tensor_is_dense_floating_and_like_the_first(operator, name):
    """Anything else is refused by the tensor's own name; so is None, where it is not the default."""
    good, first = GOOD[operator][name], next(iter(GOOD[operator]))
    refused: dict[Any, str] = {
        "x": "must be a torch.Tensor",
        good.to_sparse(): "must be a dense tensor",
        torch.nested.nested_tensor([good[:1], good[:1]]): "must be a dense tensor",
        good.int(): "must be float16",
        good.to(torch.complex64): "must be float16",
    }
    if torch.backends.mkldnn.is_available():
        refused[zeros(2, 3).to_mkldnn()] = "must be a dense tensor"
    if name not in ("bias", "rpb"):
        refused[None] = "must be a torch.Tensor, got NoneType"
    if name != first:
        refused[good.half()] = f"must have the dtype of {first}"
    for replacement, message in refused.items():
        with pytest.raises(TypeError, match=f"^{name} {message}"):
            getattr(kernels, operator)(**(GOOD[operator] | {name: replacement}))
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        getattr(kernels, operator)(**(GOOD[operator] | {name: good[0]}))
    if name != first:
        with pytest.raises(ValueError, match=f"^{name} must be on the device of {first}"):
            getattr(kernels, operator)(**(GOOD[operator] | {name: good.to("meta")}))


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_every_size_must_fit(operator, name):
    """One more, or none but of images, is refused by the name of a tensor that it does not fit."""
    good, free = GOOD[operator][name], OPERATOR[operator].free.get(name, ())
    names = "|".join(tensor for of, tensor in TENSORS if of == operator)
    for axis, length in enumerate(good.shape):
        for size in (length + 1, 0):
            if axis in free and (size or axis == 0):
                continue
            wrong = zeros(*good.shape[:axis], size, *good.shape[axis + 1 :])
            with pytest.raises(ValueError, match=rf"^({names}|groups) (must|ha)"):
                getattr(kernels, operator)(**(GOOD[operator] | {name: wrong}))


@pytest.mark.parametrize("operator", GOOD)
def test_autocast_does_not_mix_float64_with_others(operator):
    """The good arguments, all float64, stay float64; one of another type beside them is refused by name."""
    names = [name for op, name in TENSORS if op == operator]
    double = {
        key: [t.double() for t in value] if isinstance(value, list) else value for key, value in GOOD[operator].items()
    }
    double |= {name: GOOD[operator][name].double() for name in names}
    for backend, name in itertools.product(("eager", "reference"), names):
        with kernels.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            out = getattr(kernels, operator)(**double)
            assert out.dtype == torch.float64
            assert not out.any()  # of zeros
            with pytest.raises(TypeError, match=r"must have the dtype of .*autocast leaves float64"):
                getattr(kernels, operator)(**(GOOD[operator] | {name: double[name]}))


def test_numpy_ints_are_ints():
    x, weight = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 3, 3, 3, 2)
    options: dict[str, Any] = {"stride": np.int64(2), "padding": (np.int32(1), 1), "dilation": np.uint8(1)}
    assert torch.equal(kernels.involution2d(x, weight, **options), kernels.involution2d(x, weight, stride=2))
    value, logits = torch.randn(1, 5, 4, 2), torch.randn(1, 3, 2, 1, 9, 9)
    expected = kernels.outlook_attention2d(logits, value, stride=2, scale=0.5)
    options = {"stride": np.int64(2), "scale": np.float32(0.5)}
    assert torch.equal(kernels.outlook_attention2d(logits, value, **options), expected)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_steps_far_beyond_the_map_take_no_time(backend):
    """The time does not grow with the stride or, on PyTorch's paths, with the dilation."""
    logits, value = random_tensor(1, 1, 1, 1, 9, 9), random_tensor(1, 5, 4, 2)
    x, weight = random_tensor(1, 2, 5, 4), random_tensor(1, 1, 3, 3, 5, 4)
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, stride=2**31 - 1)
        assert torch.equal(out, kernels.outlook_attention2d(logits, value, stride=5))
        out = kernels.involution2d(x, weight[..., :1, :1], stride=2**31 - 1)
        assert torch.equal(out, kernels.involution2d(x, weight[..., :1, :1], stride=5))
        if backend != "triton":  # only the windows' centres lie inside the map
            x, weight = x.cpu().requires_grad_(), weight.cpu()
            out = kernels.involution2d(x, weight, dilation=2**29)
            torch.testing.assert_close(out, x * weight[:, :, 1, 1])
            (grad,) = torch.autograd.grad(out.sum(), x)
            torch.testing.assert_close(grad, weight[:, :, 1, 1].expand_as(x))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_maps_with_more_pixels_than_a_kernel_counts(operator):
    """The maps have 2^31 pixels that share one element of memory; outlook attention has a window at every other one."""
    larger = {MAP: (2**16, 2**15), (3, 2): (2**15, 2**14)}
    inputs = {}
    for name, tensor in operator.tensors(device="meta").items():
        shape = list(tensor.shape)
        axis = next((n for n in range(1, len(shape) - 1) if tuple(shape[n : n + 2]) in larger), None)
        if axis is not None:
            shape[axis : axis + 2] = larger[shape[axis], shape[axis + 1]]
        inputs[name] = zeros(1, device=DEVICE).expand(shape)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match=r"65536x32768 pixels is too large"):
        operator(inputs)


def test_a_grid_that_no_gpu_runs():
    def kernel():
        pass

    with record_launches() as launches, pytest.raises(ValueError, match=r"kernel would need a grid of .* programs"):
        launch(kernel, (1, 2**16), torch.device("cpu"), {})
    assert not launches
