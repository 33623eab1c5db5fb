"""Norms, scales and gates of the families, on feature maps [B, C, H, W], mostly in channels-last memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import transforming
from models.checks import integer, number
from models.layers.fusion import as_built
from models.layers.pointwise import PointwiseConv2d
from models.layers.tracing import leaf

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def to_channels_last(x: Tensor) -> Tensor:
    """x in channels-last memory; unchanged inside ``torch.func``'s transforms, since vmap rejects memory formats."""
    return x if transforming() else x.contiguous(memory_format=torch.channels_last)


def initialise(module: nn.Module, layers: Any, fill: Callable[..., Tensor], **options: Any) -> None:
    """``fill(weight, **options)``, from ``nn.init``, for every layer of a class or of several; biases become zero."""
    for layer in module.modules():
        if isinstance(layer, layers):
            for name, parameter in layer.named_parameters(recurse=False):
                fill(parameter, **options) if name == "weight" else nn.init.zeros_(parameter)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): zeroes a sample's whole branch with probability ``rate`` while training.

    Kept samples are divided by 1 − rate, which keeps the expectation.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = number("rate", rate, 0, 1)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def folded(self) -> nn.Module:
        return nn.Identity()

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]. The output is channels-last; channels-last input is not copied."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GELU2d(nn.GELU):
    """GELU of channels-last [B, C, H, W], computed on the contiguous view [B, H, W, C].

    PyTorch's CPU kernel treats that as one array, which halves the time.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """out = weight[c]·x + bias[c]; ``weight`` is stored as [C, 1, 1, 1], a 1×1 depthwise kernel.

    ``bias`` is None once inference has folded it into a neighbour.
    """

    def __init__(self, channels: int, initial: float = 1.0) -> None:
        super().__init__()
        channels = integer("channels", channels)
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), float(initial)))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.to(x.dtype).view(-1, 1, 1)
        return x * scale if self.bias is None else torch.addcmul(self.bias.to(x.dtype).view(-1, 1, 1), x, scale)


def affine(layer: Any, device: torch.device | None = None) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [C] of a layer that maps x to scale[c]·x + shift[c]; None for every other layer.

    It may be a ``LayerScale``, or a batch norm with running statistics.
    """
    if as_built(layer, LayerScale, device):
        return None if layer.bias is None else (layer.weight.flatten(), layer.bias)
    if not as_built(layer, BATCH_NORMS, device) or layer.training or layer.running_mean is None:
        return None
    scale = torch.rsqrt(layer.running_var + layer.eps)
    if layer.weight is None:
        return scale, -layer.running_mean * scale
    scale = layer.weight * scale
    return scale, torch.addcmul(layer.bias, layer.running_mean, scale, value=-1)


def add_scaled(scale: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
    """scale(x) + branch, in one pass over them where ``scale`` is a ``LayerScale`` without its bias."""
    if isinstance(scale, LayerScale) and scale.bias is None and as_built(scale, LayerScale):
        return torch.addcmul(branch, x, scale.weight.to(x.dtype).view(-1, 1, 1))
    return scale(x) + branch


class GlobalResponseNorm(nn.Module):
    """out = x·(γ·n/(mean_c n + 1e-6) + 1) + β with n = ‖x‖₂ over each channel's positions (arXiv 2301.00808).

    ``beta`` is None once inference has folded it into the next convolution.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        channels = integer("channels", channels)
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
            # PyTorch's CPU vector_norm is not vectorised for channels-last input, and takes four times as long.
            # The bound keeps the gradient of a channel of zeros at zero.
            norm = x.square().sum((2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        else:
            norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return self.scaled(x, norm)

    def scaled(self, x: Tensor, norm: Tensor) -> Tensor:
        """The output, given norms n [B, C, 1, 1]."""
        # On the permuted view, whose default order compiled code keeps: the next layers read channels-last maps.
        x, scale = x.permute(0, 2, 3, 1), self.scale(norm).to(x.dtype).permute(0, 2, 3, 1)
        out = x * scale if self.beta is None else torch.addcmul(self.beta.to(x.dtype).permute(0, 2, 3, 1), x, scale)
        return out.permute(0, 3, 1, 2)

    def scale(self, norm: Tensor) -> Tensor:
        """γ·n/(mean_c n + 1e-6) + 1 for norms n [B, C, 1, 1]."""
        return self.gamma * (norm / (norm.mean(1, keepdim=True) + self.eps)) + 1


class SqueezeExcite(nn.Module):
    """out = x·sigmoid(W₂·GELU(W₁·mean(x))), hidden width max(16, C/8) (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 8, minimum: int = 16) -> None:
        super().__init__()
        hidden = max(integer("minimum", minimum), integer("channels", channels) // integer("reduction", reduction))
        inward, outward = PointwiseConv2d(channels, hidden), PointwiseConv2d(hidden, channels)
        self.proj = nn.Sequential(nn.AdaptiveAvgPool2d(1), inward, nn.GELU(), outward, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)
