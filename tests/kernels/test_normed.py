"""Backward pass of a batch norm and the GELU after it, against PyTorch's derivative in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import tolerances
from tests.support import DEVICE, assert_close, random_tensor, triton_device

normed = pytest.importorskip("kernels.normed")


@pytest.fixture(autouse=True)
def _where_triton_runs():
    triton_device()


@pytest.mark.parametrize("shape", [(2, 28, 9, 8), (3, 340, 3, 5), (1, 5, 1, 2), (2, 32, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_definition(shape, dtype, monkeypatch):
    monkeypatch.setattr(normed, "PARTS", 3)  # of several tiles
    x, grad = (random_tensor(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = random_tensor(shape[1], dtype=dtype) + 1, random_tensor(shape[1], dtype=dtype)
    x += 2
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    z = F.batch_norm(exact[0], None, None, exact[1], exact[2], True, 0.1, 1e-3)
    expected = torch.autograd.grad(F.gelu(z), exact, grad.double())
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    rstd = torch.rsqrt(variance + 1e-3)
    scale = weight.float() * rstd
    statistics = scale, bias.float() - mean * scale, mean, rstd
    arguments = grad, x, weight, *statistics
    out = normed.normed_gelu_backward(*arguments)
    assert_close(out, expected, tolerances.GRADIENT[dtype])
    assert out[0].stride() == x.stride()
    assert all(map(torch.equal, out, normed.normed_gelu_backward(*arguments)))
    if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
        torch.library.opcheck(normed.normed_gelu_backward.definition, arguments)


def test_slope_of_gelu():
    """With a scale of one and no sums to speak of, dx is GELU'."""
    x = torch.linspace(-9, 9, 4096, device=DEVICE).view(1, 1, 64, 64)
    x = x.contiguous(memory_format=torch.channels_last)
    one, none = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    total = normed.normed_gelu_backward(torch.ones_like(x), x, one, one, none, none, none)
    exact = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(exact).sum(), exact)
    assert (total[0] - (slope - slope.mean())).abs().max() < 2e-6
