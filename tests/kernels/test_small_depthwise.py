"""Depthwise convolution of small channels-last maps, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import tolerances
from kernels.launch import watching_launches
from tests.support import DEVICE, assert_close, random_tensor, triton_device

small = pytest.importorskip("kernels.depthwise.small")


@pytest.fixture(autouse=True)
def _where_triton_runs():
    triton_device()


def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def run(tensors, grad, backend):
    """Output and gradients."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    with kernels.use_backend(backend):
        out = kernels.depthwise_conv2d(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_definition(shape, kernel_size, dtype):
    x, grad = (last(random_tensor(*shape, dtype=dtype)) for _ in range(2))
    weight, bias = (
        random_tensor(shape[1], 1, kernel_size, kernel_size, dtype=dtype),
        random_tensor(shape[1], dtype=dtype),
    )
    launched = []
    with watching_launches(lambda made, _: launched.append(made.kernel)):
        found = run([x, weight, bias], grad, "triton")
    assert launched.count(small._small_map_kernel) == 2
    assert launched.count(small._small_map_gradient_kernel) == 1
    exact = run([tensor.double() for tensor in (x, weight, bias)], grad.double(), "reference")
    assert_close(found[:1], exact[:1], tolerances.OUTPUT[dtype])
    assert_close(found[1:], exact[1:], tolerances.GRADIENT[dtype])
    assert found[0].stride() == found[1].stride() == x.stride()


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
def test_weight_gradient_in_chunks_of_images(programs, monkeypatch):
    """Of one image or several, the last chunk of fewer, and all in one."""
    monkeypatch.setattr(small, "PROGRAMS", programs)
    x, grad, weight = last(random_tensor(5, 3, 4, 5)), last(random_tensor(5, 3, 4, 5)), random_tensor(3, 1, 3, 3)
    exact = run([x.double(), weight.double()], grad.double(), "reference")
    assert_close(small.weight_gradient(grad, x, 3), exact[2], tolerances.GRADIENT[x.dtype])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_what_it_does_in_the_definition(bad):
    x, weight = last(random_tensor(2, 3, 7, 7)), random_tensor(3, 1, 5, 5)
    x[1, 2, 6, 3] = bad
    with kernels.use_backend("triton"):
        out = kernels.depthwise_conv2d(x, weight)
    expected = F.conv2d(x.double(), weight.double(), padding=2, groups=3)
    torch.testing.assert_close(out.double(), expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_twice_differentiable():
    tensors = [last(random_tensor(2, 3, 4, 5)), random_tensor(3, 1, 5, 5), random_tensor(3)]

    def penalty(backend):
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        with kernels.use_backend(backend):
            out = kernels.depthwise_conv2d(*given)
        first = torch.autograd.grad(out.square().sum(), given[:2], create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), given)

    assert_close(penalty("triton"), penalty("reference"), 1e-5)


def test_what_does_not_fit():
    x = last(torch.zeros(2, 4, 7, 7, device=DEVICE))
    assert small.fits(x, 7)
    assert small.fits(x, 9)
    assert not small.fits(x, 11)  # nor do a thread's registers hold
    assert not small.fits(last(torch.zeros(2, 4, 9, 10, device=DEVICE)), 7)
    assert not small.fits(last(torch.zeros(2, 4, 2, 2, device=DEVICE)), 13)
    assert not small.fits(x.contiguous(), 7)
    assert not small.fits(x[:, :3], 7)
    assert not small.fits(x.double(), 7)
    assert not small.fits(x[:0], 7)


def test_gradient_in_another_memory_order():
    """It, and what is made of it, takes the kernels for any map."""
    x, weight, grad = last(random_tensor(2, 3, 4, 5)), random_tensor(3, 1, 3, 3), random_tensor(2, 3, 4, 5)
    exact = run([x.double(), weight.double()], grad.double(), "reference")
    assert_close(run([x, weight], grad, "triton"), exact, tolerances.GRADIENT[x.dtype])
