"""RedNet 26, 38, 50, 101 and 152: ResNet with an involution in place of every 3×3 convolution of its bottlenecks.

"Involution: Inverting the Inherence of Convolution for Visual Recognition", arXiv 2103.06255, section 4.1.
Entry names are those of the published checkpoints (which carry a ``backbone.`` prefix that loading removes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models._contract import BackboneContract, pretrained_config
from models.checkpoints import load_pretrained
from models.layers import DropPath
from models.registry import register_model

__all__ = ["Bottleneck", "Involution2d", "RedNet", "rednet26", "rednet38", "rednet50", "rednet101", "rednet152"]


def _conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True)))


class Involution2d(nn.Module):
    """out[b,c,i] = Σ_k weight[b, c // group_channels, k, i] · x[b, c, i·stride − padding + k·dilation]

    where every output position generates its own K×K kernel for each group of channels from the features there:

        weight = span(ReLU(BN(reduce(pool(x)))))

    with ``pool`` the mean over stride × stride pixels (at the border: over those that exist), ``reduce`` a 1×1
    convolution to C / reduction channels and ``span`` one to K²·C / group_channels  (arXiv 2103.06255, eq. 4 to 6).
    Zero padding of (K − 1)·dilation / 2, so the output is ceil(H / stride) × ceil(W / stride).

    Shapes: x [B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)].
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
        """Raises ValueError for an even kernel, a stride or dilation below 1, channels that do not divide."""
        for name, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        for name, divisor in (("group_channels", group_channels), ("reduction", reduction)):
            if divisor < 1 or channels < divisor or channels % divisor:
                raise ValueError(f"{name} must divide channels = {channels}, got {divisor}")
        super().__init__()
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.groups = channels // group_channels
        self.conv1 = _conv_bn_relu(channels, channels // reduction, 1)
        span = nn.Conv2d(channels // reduction, kernel_size**2 * self.groups, 1)
        self.conv2 = nn.Sequential(OrderedDict(conv=span))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        weight = self.conv2(self.conv1(pooled)).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return kernels.involution2d(x, weight, stride=self.stride, dilation=self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"groups={self.groups}"
        )


class Bottleneck(nn.Module):
    """ReLU(shortcut(x) + BN(1×1(ReLU(BN(involution(ReLU(BN(1×1(x)))))))))

    The involution works on ``width`` channels and carries the stride; the block returns 4·width channels.
    ``shortcut`` is a strided 1×1 convolution and BN where the shape changes, else the identity.

    Shapes: x [B, in_channels, H, W] -> [B, 4·width, ceil(H / stride), ceil(W / stride)].
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Involution2d(width, 7, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.drop_path(self.bn3(self.conv3(out)))
        return F.relu(out.add_(self.downsample(x)), inplace=True)


class RedNet(BackboneContract):
    """Stem, four stages of bottlenecks, global average pooling and a linear classifier.

    Shapes: image [B, in_chans, H, W] with H, W >= 32 -> logits [B, num_classes], or, with ``features_only``, a list
    of the chosen maps [B, 256·2^s, ceil(H / (4·2^s)), ceil(W / (4·2^s))] after stage s = 0..3. Every halving rounds up.

    A ``features_only`` model has no classifier and ends after its last map.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            depths: blocks in each of the four stages.
            num_classes: 0 leaves the classifier out: the model then returns the pooled features.
            in_chans: channels of the image.
            drop_path_rate: probability of dropping the last block's residual branch in training; earlier ones rise
                to it linearly from 0.
            features_only: return feature maps instead of logits.
            out_indices: which stages' maps, 0..3; a number means the last so many, None all.

        Raises:
            ValueError: an argument out of range, or ``out_indices`` without ``features_only``.
        """
        super().__init__(num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path_rate)
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices needs features_only=True, got out_indices={out_indices}")
        self.features_only = features_only
        self.feature_info = [
            {"num_chs": 256 * 2**stage, "reduction": 4 * 2**stage, "module": f"layer{stage + 1}"} for stage in range(4)
        ]
        self.out_indices = self.resolve_indices(out_indices, "out_indices")
        self.feature_info = self.feature_info[: self.out_indices[-1] + 1]
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.pretrained_cfg = pretrained_config(
            crop_pct=0.875, interpolation="bilinear", first_conv="stem.0.conv", classifier="head.fc"
        )

        stem_channels = 32
        self.stem = nn.Sequential(
            _conv_bn_relu(in_chans, stem_channels, 3, stride=2),
            Involution2d(stem_channels, 3),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU(inplace=True),
            _conv_bn_relu(stem_channels, 64, 3),
        )
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        channels = 64
        for stage, info in enumerate(self.feature_info):
            blocks = []
            for index in range(depths[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, 64 * 2**stage, stride, next(drop_path_rates)))
                channels = info["num_chs"]
            self.add_module(info["module"], nn.Sequential(*blocks))
        if not features_only:
            self.classifiers = {"head.fc": channels}
            fc = self.make_classifier(channels, num_classes) if num_classes else nn.Identity()
            self.head = nn.Sequential(OrderedDict(fc=fc))
        self._initialise()

    def _initialise(self) -> None:
        """Kaiming convolutions; the last BN of a block starts at 0, so that every block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        self._check_image(x)
        # Every layer keeps the format it is given; 1×1 convolutions and involutions read whole pixels.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.stem(x))
        maps = []
        for info in self.feature_info[: last + 1]:
            for block in self.get_submodule(info["module"]).children():
                x = self._run(block, x)
            maps.append(x)
        return x, maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, 2048, h, w] -> logits [B, num_classes], or the pooled features [B, 2048]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            maps = self._forward_stages(x, self.out_indices[-1])[1]
            return [maps[index] for index in self.out_indices]
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _create(depths: Sequence[int], pretrained: bool, **kwargs: Any) -> RedNet:
    model = RedNet(depths, **kwargs)
    if pretrained:
        load_pretrained(model, model.pretrained_cfg["url"])
    return model


@register_model
def rednet26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26: 9.23 M parameters, 1.73 G multiply-adds at 224², 75.96 % top-1 on ImageNet."""
    return _create((1, 2, 4, 1), pretrained, **kwargs)


@register_model
def rednet38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38: 12.39 M parameters, 2.22 G multiply-adds at 224², 77.48 % top-1 on ImageNet."""
    return _create((2, 3, 5, 2), pretrained, **kwargs)


@register_model
def rednet50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50: 15.54 M parameters, 2.71 G multiply-adds at 224², 78.35 % top-1 on ImageNet."""
    return _create((3, 4, 6, 3), pretrained, **kwargs)


@register_model
def rednet101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101: 25.65 M parameters, 4.74 G multiply-adds at 224², 78.92 % top-1 on ImageNet."""
    return _create((3, 4, 23, 3), pretrained, **kwargs)


@register_model
def rednet152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152: 33.98 M parameters, 6.79 G multiply-adds at 224², 79.12 % top-1 on ImageNet."""
    return _create((3, 8, 36, 3), pretrained, **kwargs)
