"""OverLoCK's parts: stem and downsampling, ``RepConvBlock`` of Base-Net and Overview-Net, ``DynamicConvBlock`` of
Focus-Net."""

from typing import Any

import torch
from torch import Tensor, nn

from models.layers.basic import DropPath, GELU2d, GlobalResponseNorm, LayerNorm2d, LayerScale, SqueezeExcite, add_scaled
from models.layers.contmix import ContMix
from models.layers.depthwise import DepthwiseConv2d, DilatedReparamBlock, ResidualDepthwiseConv2d
from models.layers.fusion import as_built, last_convolution, move_bias
from models.layers.pointwise import PaddedConv2d, PointwiseConv2d
from models.layers.sequence import FusedSequential, feed_forward
from models.layers.tracing import leaf


def stem(in_chans: int, channels: int) -> nn.Sequential:
    """Image -> [B, channels, ⌈H/4⌉, ⌈W/4⌉]: four 3×3 convolutions, the first and the third with stride 2."""
    half, layers = channels // 2, []
    for inputs, outputs, stride in ((in_chans, half, 2), (half, half, 1), (half, channels, 2), (channels, channels, 1)):
        conv = PaddedConv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), GELU2d()]
    return FusedSequential(*layers[:-1])


def downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    """[B, in_channels, H, W] -> [B, out_channels, ⌈H/2⌉, ⌈W/2⌉]."""
    conv = PaddedConv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ContextDownsample(nn.Module):
    """Halves the features and the context that goes with them, each by its own strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, context_channels: int) -> None:
        super().__init__()
        self.x_proj = downsample(in_channels, out_channels)
        self.h_proj = downsample(context_channels, context_channels)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_proj(x), self.h_proj(h)


class RepConvBlock(nn.Module):
    """Base-Net and Overview-Net block: x ← x + dw₃(x), then ls(x) + drop_path(MLP(SE(BN(dilated reparam_K(LN(x)))))).

    x [B, channels, H, W]; the MLP is 4 · channels wide, ``residual_scale`` gives the residual its layer scale ls,
    ``reparam`` builds the merged form.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        drop_path: float = 0.0,
        residual_scale: bool = False,
        reparam: bool = False,
    ) -> None:
        super().__init__()
        self.dwconv = ResidualDepthwiseConv2d(channels)
        self.proj = FusedSequential(
            LayerNorm2d(channels, eps=1e-6),
            DilatedReparamBlock(channels, kernel_size, merged=reparam),
            nn.BatchNorm2d(channels),
            SqueezeExcite(channels),
            *feed_forward(channels, 4 * channels),
            DropPath(drop_path),
        )
        self.ls = LayerScale(channels) if residual_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return add_scaled(self.ls, x, self.proj(x))

    def folded(self) -> nn.Module:
        _move_shift(self.ls, self.proj)
        return self


class DynamicConvBlock(ContMix):
    """Focus-Net block: mixes features x under the guidance of the context h, and updates both.

    It inherits from ``ContMix`` because the official names put ContMix's parameters directly into the block. Its kernel
    size K is also that of the static large kernel, and its MLP is 3 · channels wide. In the ``first`` block h is the
    reference itself and is not renewed.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        kernel_size: int,
        num_heads: int,
        *,
        drop_path: float = 0.0,
        first: bool = False,
        reparam: bool = False,
    ) -> None:
        super().__init__(channels, context_channels, kernel_size, num_heads)
        width = channels + context_channels
        self.x_scale = None if first else LayerScale(context_channels)
        self.h_scale = None if first else LayerScale(context_channels)
        self.dwconv1 = ResidualDepthwiseConv2d(width)
        self.norm1 = LayerNorm2d(width, eps=1e-6)
        self.fusion = FusedSequential(
            DepthwiseConv2d(width, 3),
            nn.BatchNorm2d(width),
            GELU2d(),
            PointwiseConv2d(width, channels),
            GlobalResponseNorm(channels),
        )
        self.dyconv_proj = nn.Sequential(PointwiseConv2d(channels, channels, bias=False), nn.BatchNorm2d(channels))
        self.lepe = nn.Sequential(DilatedReparamBlock(channels, kernel_size, merged=reparam), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcite(channels)
        self.gate = nn.Sequential(PointwiseConv2d(channels, channels, bias=False), nn.BatchNorm2d(channels), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), PointwiseConv2d(channels, width))
        self.dwconv2 = ResidualDepthwiseConv2d(width)
        self.norm2 = LayerNorm2d(width, eps=1e-6)
        self.mlp = FusedSequential(*feed_forward(width, 3 * channels))
        self.ls1 = LayerScale(width)
        self.ls2 = LayerScale(width)
        self.drop_path = DropPath(drop_path)

    @leaf
    def forward(self, x_and_h: Tensor, h_reference: Tensor) -> Tensor:
        """x and h, concatenated [B, d + c, H, W], and h_reference [B, c, H, W] -> new x and h, concatenated."""
        if self.x_scale is not None and self.h_scale is not None:
            x, h = x_and_h.split((self.channels, self.context_channels), 1)
            x_and_h = torch.cat((x, add_scaled(self.h_scale, h_reference, self.x_scale(h))), 1)
        residual = self.dwconv1(x_and_h)
        features = self.norm1(residual)
        x = self.fusion(features)
        mixed = self.dyconv_proj(super().forward(x, features)) + self.lepe(x)
        x = add_scaled(self.ls1, residual, self.drop_path(self.proj(self.se_layer(mixed) * self.gate(x))))
        x = self.dwconv2(x)
        return add_scaled(self.ls2, x, self.drop_path(self.mlp(self.norm2(x))))

    def folded(self) -> nn.Module:
        _move_shift(self.ls1, self.proj)
        _move_shift(self.ls2, self.mlp)
        _move_shift(self.h_scale, self.x_scale)
        return super().folded()


def _move_shift(scale: Any, branch: Any) -> None:
    """Lets the branch's last convolution (or layer scale) add the shift of ``scale``: their outputs are summed."""
    if as_built(scale, LayerScale):
        move_bias(scale, branch if as_built(branch, LayerScale) else last_convolution(branch, FusedSequential))
