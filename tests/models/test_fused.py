"""What inference fuses runs in Triton's interpreter here, in float16, against the same layers by themselves."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import kernels
import models
from models.layers import GlobalResponseNorm
from models.layers.fused import FusedDepthwiseConv2d, FusedFeedForward, fuse
from models.layers.overlock_blocks import feed_forward
from tests.models.families import fill, images, narrow
from tests.support import assert_close, random_tensor, randomise, triton_device


def plain_feed_forward(channels: int, hidden: int) -> nn.Sequential:
    """Before it is fused: with the ordinary convolution that a residual one becomes."""
    layers: Any = randomise(nn.Sequential(*feed_forward(channels, hidden)), torch.float32).requires_grad_(False)
    layers[2] = layers[2].folded()
    return layers


@pytest.mark.parametrize("side", [3, 9])  # the norm scales the map, or the projection's weights
def test_feed_forward(side):
    device = triton_device()
    plain = plain_feed_forward(12, 24).to(device)
    fused: Any = copy.deepcopy(plain)
    fuse(fused)
    assert [type(layer) for layer in fused[1:]] == [FusedFeedForward, nn.Identity, nn.Identity, nn.Identity]
    x = random_tensor(2, 12, side, side).contiguous(memory_format=torch.channels_last)
    expected = plain(x)
    assert_close(fused(x), expected, 1e-6)  # float32: PyTorch's layers
    with kernels.use_backend("triton"):
        out = fused.half()(x.half())
    assert_close(out, expected, 3e-3)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_depthwise_convolution():
    conv = randomise(nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.float32).requires_grad_(False).to(triton_device())
    layers: Any = nn.Sequential(copy.deepcopy(conv))
    fuse(layers)
    fuse(layers)  # a second time changes nothing
    assert type(layers[0]) is FusedDepthwiseConv2d
    x = random_tensor(2, 6, 5, 8).contiguous(memory_format=torch.channels_last)
    layers.half()
    with kernels.use_backend("triton"):
        assert_close(layers(x.half()), conv(x), 2e-3)
        assert_close(layers(x.half().contiguous()), conv(x), 2e-3, "by PyTorch, of channels-first maps")
        x = x.half().requires_grad_()
        (gradient,) = torch.autograd.grad(layers(x).sum(), x)
    assert gradient.abs().sum() > 0


def test_whole_model():
    triton_device()
    model = fill(narrow("overlock")).eval()
    fused = models.optimize_for_inference(model)
    kinds = [type(layer) for layer in fused.modules()]
    blocks = [type(layer) for layer in model.modules()].count(GlobalResponseNorm)
    assert 0 < kinds.count(FusedFeedForward) < blocks  # fusion's norms have no convolution before them
    x = images(2, 3, 64, 64)
    with torch.no_grad(), kernels.use_backend("triton"):
        assert_close(fused.half()(x.half()), model(x), 1e-2)
