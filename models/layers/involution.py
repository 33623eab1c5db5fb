"""Involution, its kernels generated from the features they act on, as a layer."""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.checks import integer, odd
from models.layers.fusion import as_built, convolves
from models.layers.pointwise import PaddedConv2d, PointwiseConv2d
from models.layers.tracing import leaf


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """ReLU(BN(convolution)): [B, in_channels, H, W] -> [B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
    if kernel_size == stride == 1:
        conv = PointwiseConv2d(in_channels, out_channels, bias=False)
    else:
        conv = PaddedConv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


class Involution2d(nn.Module):
    """out[b,c,i] = Σ_k weight[b, c // group_channels, k, i] · x[b, c, i·stride − padding + k·dilation]

    where every output position generates its own K×K kernel for each group of channels from the features there:

        weight = span(ReLU(BN(reduce(pool(x)))))

    with ``pool`` the mean over stride × stride pixels (at the border: over those that exist), ``reduce`` a 1×1
    convolution to C / reduction channels and ``span`` one to K²·C / group_channels  (arXiv 2103.06255, eq. 4 to 6).
    Zero padding of (K − 1)·dilation / 2, so the output is ceil(H / stride) × ceil(W / stride).

    Shapes: x [B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)].

    In place of a 3×3 convolution, with an eighth of its parameters::

        layer = Involution2d(64, kernel_size=7, stride=2)
        layer(torch.randn(2, 64, 56, 56)).shape               # [2, 64, 28, 28]

    Args:
        channels: C.
        kernel_size: K, odd.
        stride: pixels between output positions.
        dilation: pixels between window positions.
        group_channels: channels that share a kernel; divides C.
        reduction: C over the channels from which kernels are computed; divides C.

    Raises:
        ValueError: an option out of its range; in the forward pass, an x that is not [B, C, H, W].
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        *,
        dilation: int = 1,
        group_channels: int = 16,
        reduction: int = 4,
    ) -> None:
        channels, kernel_size = integer("channels", channels), odd("kernel_size", kernel_size)
        stride, dilation = integer("stride", stride), integer("dilation", dilation)
        for name, divisor in (("group_channels", group_channels), ("reduction", reduction)):
            if channels % integer(name, divisor):
                raise ValueError(f"{name} must divide channels = {channels}, got {divisor}")
        super().__init__()
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.groups = channels // group_channels
        self.conv1 = conv_bn_relu(channels, channels // reduction, 1)
        span = nn.Conv2d(channels // reduction, kernel_size**2 * self.groups, 1)
        self.conv2 = nn.Sequential(OrderedDict(conv=span))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape [B, {self.channels}, H, W], got {list(x.shape)}")
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        features = self.conv1(pooled)
        window = {"stride": self.stride, "dilation": self.dilation}
        whole = as_built(self.conv2, nn.Sequential, x.device) and len(self.conv2) == 1
        span: Any = self.conv2[0] if whole else self.conv2
        if convolves(span, 1, x.device):
            # The per-pixel kernels would take more memory than x: the operator makes them tile by tile.
            shape = {"kernel_size": self.kernel_size, "groups": self.groups, **window}
            return kernels.involution2d_generate(x, features, span.weight.flatten(1), span.bias, **shape)
        weight = self.conv2(features).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return kernels.involution2d(x, weight, **window)

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
        return f"{self.channels}, {window}, groups={self.groups}"
