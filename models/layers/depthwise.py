"""Depthwise convolutions: residual 3×3, large kernels, and large kernels trained with dilated branches beside them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

import kernels

__all__ = ["DepthwiseConv2d", "DilatedReparamBlock", "ResidualDepthwiseConv2d"]


class ResidualDepthwiseConv2d(nn.Conv2d):
    """x + depthwise 3×3 convolution of x."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with "same" padding, computed by ``kernels.depthwise_conv2d``: for kernels beyond 3×3."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return kernels.depthwise_conv2d(input, self.weight, self.bias)


class DilatedReparamBlock(nn.Module):
    """BN(K×K depthwise of x) + Σ BN(dilated depthwise of x), one K×K kernel with bias once merged (arXiv 2311.15599).

    While batch norms use their running statistics every branch is linear, so the sum is itself one K×K convolution:
    then it is computed as such, merged or not. ``merge`` makes that permanent.

    Args:
        channels: C of the [B, C, H, W] input and output.
        kernel_size: K, one of 17, 15, 13, 7.
        merged: build the form that ``merge`` leads to.
    """

    BRANCHES: ClassVar = {  # K -> (kernel size, dilation) of each parallel branch
        17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
        15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    }

    def __init__(self, channels: int, kernel_size: int, merged: bool = False) -> None:
        super().__init__()
        if kernel_size not in self.BRANCHES:
            raise ValueError(f"kernel_size must be one of {sorted(self.BRANCHES)}, got {kernel_size}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.lk_origin = DepthwiseConv2d(channels, kernel_size, bias=merged)
        if merged:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for size, dilation in self.BRANCHES[kernel_size]:
            if dilation == 1:
                conv = DepthwiseConv2d(channels, size, bias=False)
            else:
                reach = dilation * (size // 2)
                conv = nn.Conv2d(
                    channels, channels, size, padding=reach, dilation=dilation, groups=channels, bias=False
                )
            self.add_module(f"dil_conv_k{size}_{dilation}", conv)
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    @property
    def merged(self) -> bool:
        return not hasattr(self, "origin_bn")

    def branches(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolution and batch norm of every branch still separate, the K×K one first; none once merged."""
        if self.merged:
            return []
        names = [f"k{size}_{dilation}" for size, dilation in self.BRANCHES[self.kernel_size]]
        dilated = [(getattr(self, f"dil_conv_{name}"), getattr(self, f"dil_bn_{name}")) for name in names]
        return [(self.lk_origin, self.origin_bn), *dilated]

    def merged_parameters(self) -> tuple[Tensor, Tensor]:
        """Kernel [C, 1, K, K] and bias [C] of the one convolution that equals the sum of all branches."""
        convs, norms = zip(*self.branches(), strict=True)
        # [branches, C] at once: a GPU spends longer on starting these operations than on running them.
        weight, shift, mean, variance = (
            torch.stack([getattr(norm, name) for norm in norms])
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * torch.rsqrt(variance + self.origin_bn.eps)
        kernel = torch.zeros_like(self.lk_origin.weight)
        sizes = ((self.kernel_size, 1), *self.BRANCHES[self.kernel_size])
        for (size, dilation), conv, factor in zip(sizes, convs, scale.unbind(), strict=True):
            first = (self.kernel_size - 1 - dilation * (size - 1)) // 2
            taps = slice(first, self.kernel_size - first, dilation)
            kernel[:, :, taps, taps] += conv.weight * factor.view(-1, 1, 1, 1)
        return kernel, (shift - mean * scale).sum(0)

    @torch.no_grad()
    def merge(self) -> None:
        """Replaces all branches by their sum, with the batch norms' running statistics; only once."""
        if self.merged:
            return
        merged = DepthwiseConv2d(self.channels, self.kernel_size)
        kernel, bias = self.merged_parameters()
        merged.weight = nn.Parameter(kernel, requires_grad=self.lk_origin.weight.requires_grad)
        merged.bias = nn.Parameter(bias, requires_grad=self.lk_origin.weight.requires_grad)
        for name, _ in list(self.named_children()):
            delattr(self, name)
        self.lk_origin = merged.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.branches()
        if not branches:
            return self.lk_origin(x)
        if any(norm.training for _, norm in branches):
            out = self.origin_bn(self.lk_origin(x))
            for conv, norm in branches[1:]:
                out = out + norm(conv(x))
            return out
        return kernels.depthwise_conv2d(x, *self.merged_parameters())
