"""Layers from which the families are built. Feature maps are [B, C, H, W], in channels-last memory where it matters."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

__all__ = [
    "ContMix",
    "DepthwiseConv2d",
    "DilatedReparamBlock",
    "DropPath",
    "GELU2d",
    "GlobalResponseNorm",
    "LayerNorm2d",
    "LayerScale",
    "ResidualDepthwiseConv2d",
    "SqueezeExcite",
]


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): zeroes a sample's whole branch with probability ``rate`` while training.

    Kept samples are divided by 1 − rate, so that the expectation stays.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]; the output is channels-last, and input that is so takes no copy."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GELU2d(nn.GELU):
    """GELU of channels-last [B, C, H, W], handed over as the contiguous [B, H, W, C] it is.

    PyTorch's CPU kernel takes that as one array, in half the time.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """out = weight[c]·x + bias[c]; ``weight`` is stored as [C, 1, 1, 1], a 1×1 depthwise kernel."""

    def __init__(self, channels: int, initial: float = 1.0) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.initial)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype).view(-1, 1, 1)
        return torch.addcmul(bias, x, self.weight.to(x.dtype).view(-1, 1, 1))


class GlobalResponseNorm(nn.Module):
    """out = x·(γ·n/(mean_c n + 1e-6) + 1) + β with n = ‖x‖₂ over each channel's positions (arXiv 2301.00808)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
            # PyTorch's CPU vector_norm is not vectorised for channels-last input: four times as slow as these.
            # The bound keeps the gradient of a channel of zeros at zero.
            norm = x.square().sum((2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        else:
            norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        scale = self.gamma * (norm / (norm.mean(1, keepdim=True) + self.eps)) + 1
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


class SqueezeExcite(nn.Module):
    """out = x·sigmoid(W₂·GELU(W₁·mean(x))), hidden width max(16, C/8) (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 8, minimum: int = 16) -> None:
        super().__init__()
        hidden = max(minimum, channels // reduction)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


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


class ContMix(nn.Module):
    """Context-mixing dynamic convolution: each position's kernels come from its affinity to a pooled context.

    With Q = BN(W_q·f) and R = BN(W_k·pool₇ₓ₇(c)), split into G heads of d/(2G) channels, where d = ``channels``:

        affinity = (d/G)^−½ · Qᵀ·R            49 numbers a position and head
        logits   = P·affinity + b             25 + K² numbers
        out      = [Σ_k softmax(logits₅ + rpb1)[k] · x₁[nbr₅(k)],  Σ_k softmax(logits_K + rpb2)[k] · x₂[nbr_K(k)]]

    x₁ and x₂ are the two halves of x's channels; windows slide inward at the border (arXiv 2502.20087, section 3.3).
    Maps with a side below K are enlarged bilinearly beforehand and pooled back afterwards.

    Args:
        channels: d, a multiple of 2G.
        context_channels: channels of the context map c.
        kernel_size: K of the large kernel, odd.
        num_heads: G.
    """

    SMALL_KERNEL = 5
    CONTEXT_SIZE = 7

    def __init__(self, channels: int, context_channels: int, kernel_size: int, num_heads: int) -> None:
        super().__init__()
        if channels % (2 * num_heads):
            raise ValueError(f"channels must be a multiple of 2·num_heads = {2 * num_heads}, got {channels}")
        self.channels = channels
        self.context_channels = context_channels
        self.num_heads = num_heads
        self.kernel_sizes = (self.SMALL_KERNEL, kernel_size)
        self.scale = (channels / num_heads) ** -0.5
        self.rpb1 = nn.Parameter(torch.zeros(num_heads, 2 * self.SMALL_KERNEL - 1, 2 * self.SMALL_KERNEL - 1))
        self.rpb2 = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.weight_query = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1, bias=False), nn.BatchNorm2d(channels // 2)
        )
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(self.CONTEXT_SIZE),
            nn.Conv2d(context_channels, channels // 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
        )
        self.weight_proj = nn.Conv2d(self.CONTEXT_SIZE**2, sum(k * k for k in self.kernel_sizes), 1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Mixes x.

        Args:
            x: what is mixed, [B, d, H, W].
            features: what the kernels come from, [B, d + context_channels, H, W]: f and c, one above the other.

        Returns:
            [B, d, H, W].
        """
        size = (x.shape[2], x.shape[3])
        enlarged = self.mixing_size(*size)
        if enlarged != size:
            x = F.interpolate(x, enlarged, mode="bilinear")
            features = F.interpolate(features, enlarged, mode="bilinear")
        query = self.weight_query(features[:, : self.channels])
        key = self.weight_key(features[:, self.channels :]) * self.scale
        assert self.weight_proj.bias is not None
        mixed = kernels.contmix2d(
            query.unflatten(1, (self.num_heads, -1)),
            key.unflatten(1, (self.num_heads, -1)).flatten(3),
            x.unflatten(1, (2, self.num_heads, -1)),
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            (self.rpb1, self.rpb2),
            kernel_sizes=self.kernel_sizes,
        )
        mixed = mixed.flatten(1, 3).contiguous(memory_format=torch.channels_last)
        return mixed if enlarged == size else F.adaptive_avg_pool2d(mixed, size)

    def mixing_size(self, height: int, width: int) -> tuple[int, int]:
        """The map's size while it is mixed: as it is, or enlarged until the large kernel just fits."""
        kernel_size, short = self.kernel_sizes[-1], min(height, width)
        if short >= kernel_size:
            return height, width
        # The quotient first, in floating point: what the official weights were trained with, to the pixel. A square
        # map's side may round to K − 1 this way.
        ratio = kernel_size / short
        return max(kernel_size, int(ratio * height)), max(kernel_size, int(ratio * width))
