"""depthwise_conv2d of channels-last maps in kernels of their own: small maps; 3×3 windows, with GELU or without."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import tolerances
from kernels.depthwise import expanded, fused, sliding, small
from kernels.depthwise.op import residual_depthwise_conv2d
from kernels.launch import record_launches
from tests.support import DEVICE, assert_close, channels_last, differentiated, names_of, random_tensor, watching

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
SLIDING = {"sliding_kernel": 2}
SMALL = {"_small_map_kernel": 2, "_small_map_gradient_kernel": 1}


def drawn(shape, kernel_size=3, dtype=torch.float32) -> list[torch.Tensor]:
    """A channels-last map, weight and bias."""
    x, channels = channels_last(random_tensor(*shape, dtype=dtype)), shape[1]
    weight = random_tensor(channels, 1, kernel_size, kernel_size, dtype=dtype)
    return [x, weight, random_tensor(channels, dtype=dtype)]


def doubled(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.fixture(
    params=[((2, 6, 5, 9), 3072), ((1, 66, 5, 8), 3072), ((1, 34, 4, 14), 3072), ((5, 2, 3, 1), 1)],
    ids=lambda param: str(param[0]),
)
def shape(request, monkeypatch):
    """Maps of several strips, bands and blocks of channels, cut short or not, and of one band."""
    shape, programs = request.param
    monkeypatch.setattr(fused, "LEAST", 2)
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    return shape


def check(function, shape, kernel_size, dtype, launches):
    """Output and gradients, each by those kernels."""
    tensors, grad = drawn(shape, kernel_size, dtype), channels_last(random_tensor(*shape, dtype=dtype))
    with watching() as launched:
        found = differentiated(function, tensors, [grad], "triton")
    assert {name: number for name, number in names_of(launched).items() if name in SMALL | SLIDING} == launches
    exact = differentiated(function, doubled(tensors), [grad.double()], "reference")
    assert_close(found[:1], exact[:1], tolerances.OUTPUT[dtype])
    assert_close(found[1:], exact[1:], tolerances.GRADIENT[dtype])
    assert found[0].stride() == found[1].stride() == grad.stride()


# The models' map; one that its program's channels do not fill; kernels larger than a map, and of one weight.
@pytest.mark.parametrize(
    ("shape", "kernel_size"),
    [
        ((3, 4, 7, 7), 7),
        ((2, 37, 5, 3), 5),
        ((1, 6, 8, 10), 7),
        ((2, 3, 2, 3), 9),
        ((2, 5, 6, 1), 3),
        ((1, 2, 11, 9), 1),
    ],
)
@DTYPES
def test_small_maps(shape, kernel_size, dtype):
    check(kernels.depthwise_conv2d, shape, kernel_size, dtype, SMALL)


@pytest.mark.parametrize("function", [kernels.depthwise_conv2d, residual_depthwise_conv2d])
@DTYPES
def test_windows_of_3(shape, function, dtype):
    check(function, shape, 3, dtype, SLIDING)


@pytest.mark.parametrize("residual", [False, True])
@DTYPES
def test_gelu_convolution(shape, residual, dtype):
    """Outputs and gradients, through both outputs."""
    tensors = drawn(shape, dtype=dtype)
    grads = [channels_last(random_tensor(*shape, dtype=dtype)), random_tensor(*shape[:2]) / 10]
    assert fused.fits(tensors[0])

    def definition(x, weight, bias):
        entering = F.gelu(x)
        out = F.conv2d(entering, weight, bias, padding=1, groups=shape[1]) + (entering if residual else 0)
        return out, out.square().sum((2, 3))

    found = differentiated(lambda *tensors: sliding.gelu_convolve(*tensors, residual), tensors, grads)
    exact = differentiated(definition, doubled(tensors), doubled(grads))
    assert_close(found, exact, 3e-6 if dtype == torch.float32 else tolerances.GRADIENT[dtype])
    assert found[0].stride() == found[2].stride() == tensors[0].stride()


def test_gelu_convolution_is_differentiable_once_and_counted():
    x, weight, _ = drawn((1, 2, 3, 3))
    with FlopCounterMode(display=False) as counter:  # which sees the operator
        out, squares = sliding.gelu_convolve(x.requires_grad_(), weight, None, False)
    assert counter.get_total_flops() == 18 * x.numel()
    (through_one,) = torch.autograd.grad(squares.sum(), x, retain_graph=True)  # the other has no gradient
    assert through_one.abs().sum() > 0
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_gelu_of_small_and_large_numbers(scale):
    """And its slope, by a convolution that copies."""
    x = channels_last(torch.linspace(-8, 8, 2 * 49 * 16, device=DEVICE).view(2, 16, 7, 7) * scale).requires_grad_()
    weight = torch.zeros(16, 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 1
    out, _ = sliding.gelu_convolve(x, weight, torch.zeros(16, device=DEVICE), False)
    assert (out - F.gelu(x.double())).abs().max() < 1e-6 * scale
    exact = x.detach().double().requires_grad_()
    (slope,), (expected,) = (torch.autograd.grad(y.sum(), t) for y, t in ((out, x), (F.gelu(exact), exact)))
    assert (slope - expected).abs().max() < 3e-6


@pytest.mark.parametrize("form", ["small", "sliding", "gelu"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite(bad, form):
    """Infinity gives infinity, its negative by GELU NaN, as in PyTorch; neither reaches more outputs than there."""
    x = channels_last(torch.zeros(2, 2, 9, 9, device=DEVICE))
    x[1, 1, 4, 4] = bad
    size = 5 if form == "small" else 3
    weight = torch.ones(2, 1, size, size, device=DEVICE)
    entering = F.gelu(x.double()) if form == "gelu" else x.double()
    expected = F.conv2d(entering, weight.double(), padding=size // 2, groups=2)
    if form == "gelu":
        out, squares = sliding.gelu_convolve(x, weight, torch.zeros(2, device=DEVICE), False)
        torch.testing.assert_close(squares.double(), expected.square().sum((2, 3)), equal_nan=True)
    else:
        with kernels.use_backend("triton"):
            out = kernels.depthwise_conv2d(x, weight)
    torch.testing.assert_close(out.double(), expected, equal_nan=True)


def after_expansion(x, expand, shift, weight, bias, residual):
    """What ``expanded`` defines, in float64."""
    x, expand, shift, weight, bias = doubled((x, expand, shift, weight, bias))
    entering = F.gelu(F.conv2d(x, expand[:, :, None, None], shift))
    out = F.conv2d(entering, weight, bias, padding=1, groups=len(weight)) + (entering if residual else 0)
    return out, out.square().sum((2, 3))


# Several bands, strips and blocks of channels; programs and strips that are cut short; two pixels.
@pytest.mark.parametrize("case", [(2, 12, 72, 9, 14), (3, 16, 6, 5, 17), (1, 16, 34, 1, 2), (1, 64, 66, 4, 29)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolution_of_gelu_after_an_expansion(case, residual, dtype, monkeypatch):
    monkeypatch.setattr(expanded, "LEAST", 2)
    monkeypatch.setattr(expanded, "FEW", 0)
    batch, inputs, channels, *sides = case
    x = channels_last(random_tensor(batch, inputs, *sides, dtype=dtype))
    expand, shift = random_tensor(channels, inputs, dtype=dtype), random_tensor(channels, dtype=dtype)
    _, weight, bias = drawn((1, channels, 1, 1), dtype=dtype)
    arguments = x, expand, shift, weight, bias, residual
    assert expanded.takes(x, channels)
    found = expanded.expanded_convolve(*arguments)
    assert_close(found, after_expansion(*arguments), tolerances.GRADIENT[dtype])  # GELU's argument is rounded
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:  # which sees the operator
        assert all(map(torch.equal, found, expanded.expanded_convolve(*arguments)))
    assert counter.get_total_flops() == 2 * found[0].numel() * (inputs + 9)
    if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
        torch.library.opcheck(expanded.expanded_convolve.definition, arguments)


def test_what_is_not_finite_before_an_expansion(monkeypatch):
    """It reaches the window around it, in every channel."""
    monkeypatch.setattr(expanded, "FEW", 0)
    x = channels_last(random_tensor(1, 4, 5, 30, dtype=torch.float16))
    x[0, 1, 2, 14] = float("nan")  # a neighbour of the first strip
    expand, (_, weight, bias) = random_tensor(6, 4, dtype=torch.float16), drawn((1, 6, 1, 1), dtype=torch.float16)
    arguments = x, expand, bias, weight, bias, True
    out, squares = expanded.expanded_convolve(*arguments)
    assert torch.equal(out.isnan(), after_expansion(*arguments)[0].isnan())
    assert out.isnan().sum() == 6 * 9
    assert squares.isnan().all()


def test_which_maps_are_expanded():
    """OverLoCK-T's first stage at 224 pixels and at 800×1280; not its second, and not one image."""

    def large(*shape, dtype=torch.bfloat16):
        return channels_last(torch.empty(shape, dtype=dtype, device="meta"))

    with record_launches():
        assert expanded.takes(large(128, 64, 56, 56), 256)
        assert expanded.takes(large(2, 64, 200, 320), 256)
        assert not expanded.takes(large(128, 128, 28, 28), 512)
        assert not expanded.takes(large(1, 64, 56, 56), 256)
        assert not expanded.takes(large(128, 64, 56, 56, dtype=torch.float32), 256)
        assert not expanded.takes(large(128, 64, 56, 56), 255)
        assert not expanded.takes(large(128, 64, 56, 56).contiguous(), 256)


@pytest.mark.parametrize("strict", [False, True])
def test_a_batch_of_an_exported_program_may_have_any_size(strict, monkeypatch):
    class Chosen(torch.nn.Module):
        def forward(self, x):
            return x + (1 if expanded.takes(x, 256) else 2)

    monkeypatch.setattr(expanded, "fits", lambda _: True)
    monkeypatch.setattr(expanded, "is_hopper", lambda: True)
    x, batch = torch.zeros(128, 64, 56, 56, dtype=torch.float16), torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(Chosen(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert (program.module()(x[:1]) == 2).all()


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_twice_differentiable_and_counted(kernel_size):
    shape = (2, 4, 4, 5)
    tensors = drawn(shape, kernel_size)

    def penalty(backend):
        def of_first(*tensors):
            with kernels.use_backend(backend):
                out = kernels.depthwise_conv2d(*tensors)
            first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
            return torch.stack([gradient.square().sum() for gradient in first]).sum()

        return differentiated(of_first, tensors)

    assert_close(penalty("triton"), penalty("reference"), 1e-5)
    with FlopCounterMode(display=False) as counter:
        differentiated(kernels.depthwise_conv2d, tensors, [channels_last(random_tensor(*shape))], "triton")
    assert counter.get_total_flops() == 3 * 2 * kernel_size**2 * tensors[0].numel()
    if DEVICE == "cuda" and kernel_size == 3:  # PyTorch traces no interpreted kernels
        x, weight, bias = tensors
        for operator in (sliding.convolve, sliding.gelu_convolve):
            torch.library.opcheck(operator.definition, (x, weight, bias, True))
        torch.library.opcheck(sliding.gradients.definition, (x, x, weight, True))


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
def test_weight_gradient_of_small_maps_in_chunks_of_images(programs, monkeypatch):
    """Of one image or several, the last chunk of fewer, and all in one."""
    monkeypatch.setattr(small, "PROGRAMS", programs)
    (x, weight, _), grad = drawn((5, 3, 4, 5)), channels_last(random_tensor(5, 3, 4, 5))
    exact = differentiated(kernels.depthwise_conv2d, doubled((x, weight)), [grad.double()], "reference")
    assert_close(small.weight_gradient(grad, x, 3), exact[2], tolerances.GRADIENT[x.dtype])


def test_gradient_in_another_memory_order():
    """It, and what is made of it, takes the kernels for any map."""
    (x, weight, _), grad = drawn((2, 3, 4, 5)), random_tensor(2, 3, 4, 5)
    exact = differentiated(kernels.depthwise_conv2d, doubled((x, weight)), [grad.double()], "reference")
    found = differentiated(kernels.depthwise_conv2d, [x, weight], [grad], "triton")
    assert_close(found, exact, tolerances.GRADIENT[x.dtype])


def test_what_does_not_fit():
    x, image = channels_last(torch.zeros(2, 4, 7, 7, device=DEVICE)), torch.zeros(2, 4, 9, 10, device=DEVICE)
    assert small.fits(x, 7)
    assert small.fits(x, 9)
    assert not small.fits(x, 11)  # nor do a thread's registers hold
    assert not small.fits(channels_last(image), 7)
    assert not small.fits(channels_last(image[..., :2, :2]), 13)
    assert not small.fits(x.double(), 7)
    assert fused.fits(x)
    for other in (x.contiguous(), x[:, :3], x[:0]):  # channels first, a slice of the channels, an empty batch
        assert not small.fits(other, 7)
        assert not fused.fits(other)
    assert not fused.fits(channels_last(x[:, :3]))  # it takes pairs of channels


def test_meta_tensors_have_shapes_alone():
    x = channels_last(torch.empty(2, 4, 5, 6, device="meta")).requires_grad_()
    weight = torch.empty(4, 1, 3, 3, device="meta")
    with kernels.use_backend("triton"):
        for function in (kernels.depthwise_conv2d, residual_depthwise_conv2d):
            out = function(x, weight, None)
            assert out.stride() == x.stride()
            assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("shapes", [((4, 1, 3, 3), None), ((8, 1, 5, 3), None), ((8, 1, 3, 3), (4,))])
def test_what_does_not_fit_together_is_refused(shapes):
    x = channels_last(torch.zeros(1, 8, 4, 4, device=DEVICE))
    weight, bias = (None if shape is None else torch.zeros(shape, device=DEVICE) for shape in shapes)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="must have shape"):
        residual_depthwise_conv2d(x, cast("torch.Tensor", weight), bias)


def test_forward_mode_through_a_recorded_graph_is_refused():
    x, weight, _ = drawn((2, 4, 5, 6))
    with kernels.use_backend("triton"):
        out = kernels.depthwise_conv2d(x.requires_grad_(), weight)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=r"use_backend\(\"reference\"\)"):
            torch.autograd.grad(out, x, grad)
