"""Compiled code beyond the rule of one graph: strides, transforms inside it, sizes that vary."""

import itertools

import pytest
import torch
import torch._inductor.config
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from tests.kernels.operators import OPERATORS
from tests.support import random_tensor

LAYOUTS = {
    "heads first": lambda tensor: tensor,
    "channels first": lambda tensor: tensor.movedim(-1, 2).contiguous().movedim(2, -1),
    "heads last": lambda tensor: tensor.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["na2d_av", "na2d_qk", "na2d_softmax_av"])
def test_strides_of_thin_maps(name, layout):
    """Fake tensors, which compiled code is planned with, have the strides that eager mode gives, of axes of length 1
    too; so have their gradients."""
    lay_out = LAYOUTS[layout]
    for batch, heads, size, channels in itertools.product((1, 2), (1, 2), ((5, 1), (1, 4), (4, 5)), (1, 3)):
        kernel_size = [min(3, length) for length in size]
        kernel_size = [length - 1 + length % 2 for length in kernel_size]
        feature = lay_out(random_tensor(batch, heads, *size, channels))
        kernel = lay_out(random_tensor(batch, heads, *size, kernel_size[0] * kernel_size[1]))

        def run(feature, kernel, kernel_size=kernel_size):
            first = feature if name == "na2d_qk" else kernel
            inputs = first.detach().requires_grad_(), feature.detach().requires_grad_()
            out = getattr(kernels, name)(*inputs, kernel_size)
            return [tensor.stride() for tensor in (out, *torch.autograd.grad(out, inputs, torch.ones_like(out)))]

        with FakeTensorMode() as mode:
            fakes = mode.from_tensor(feature), mode.from_tensor(kernel)
            planned = run(*fakes)
        assert run(feature, kernel) == planned, (batch, heads, size, channels)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_transforms_inside_compiled_functions(operator):
    """torch.func.grad and jvp there, where the operators have to give way to the reference."""
    tensors = operator.tensors()
    (name, first), *others = tensors.items()

    def function(value):
        return operator({name: value} | dict(others))

    def both(value):
        return torch.func.grad(lambda x: function(x).sin().sum())(value), torch.func.jvp(function, (value,), (value,))[
            1
        ]

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")(first)
    for ours, expected in zip(compiled, both(first), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_in_inductor(monkeypatch):
    """The output's sizes are sums there, H + 2 by W + 2, and strides their products."""
    monkeypatch.undo()  # Inductor cannot work with a poisoned torch.empty
    torch.compiler.reset()

    def function(x, weight):
        return kernels.involution2d(x, weight, padding=1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 5, 6), (3, 7, 9)):
        x, weight = random_tensor(batch, 4, height, width), random_tensor(batch, 2, 1, 1, height + 2, width + 2)
        torch.testing.assert_close(compiled(x, weight), function(x, weight))


@pytest.mark.slow
def test_views_of_maps_in_inductor(monkeypatch):
    """One operator takes a map as it is, another a view of it. Inductor would pad such a map on a GPU, and PyTorch 2.11
    then read the view by strides that the map did not have."""
    monkeypatch.undo()
    torch.compiler.reset()

    def function(attn, weight, a, b, c, d, e):
        x = a + b * c + d * e  # enough to be stored before it is used
        value = x.unflatten(1, (12, 28)).permute(0, 1, 3, 4, 2)
        return kernels.na2d_av(attn, value, 3), kernels.depthwise_conv2d(x, weight)

    maps = [random_tensor(2, 336, 7, 7).to(memory_format=torch.channels_last) for _ in range(5)]
    inputs = random_tensor(2, 12, 7, 7, 9), random_tensor(336, 1, 5, 5), *maps
    with torch._inductor.config.patch(disable_padding_cpu=False):
        found = torch.compile(function, fullgraph=True, dynamic=False)(*inputs)
    torch.testing.assert_close(found, function(*inputs))
