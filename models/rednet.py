"""RedNet 26, 38, 50, 101 and 152: ResNet with an involution in place of every 3×3 convolution of its bottlenecks.

"Involution: Inverting the Inherence of Convolution for Visual Recognition", arXiv 2103.06255, section 4.1.
Entry names are those of the published checkpoints (which carry a ``backbone.`` prefix that loading removes).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models._contract import BackboneContract, Stage, pretrained_config
from models.checks import integer, integers
from models.layers import DropPath, Involution2d, PointwiseConv2d
from models.layers.basic import initialise, to_channels_last
from models.layers.involution import conv_bn_relu
from models.layers.rednet_inference import FoldedBottleneck, pool_first
from models.registry import Published, variant


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
        self.conv1 = PointwiseConv2d(in_channels, width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Involution2d(width, 7, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = PointwiseConv2d(width, out_channels, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.drop_path(self.bn3(self.conv3(out)))
        return F.relu(out + self.downsample(x))

    def folded(self) -> nn.Module:
        first = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2)
        last = nn.Sequential(self.conv3, self.bn3, self.drop_path)
        return FoldedBottleneck(first, self.bn2, last, self.downsample).train(self.training)


class RedNet(BackboneContract):
    """Stem, four stages of bottlenecks, global average pooling and a linear classifier.

    Shapes: image [B, in_chans, H, W] with H, W >= 32 -> logits [B, num_classes], or, with ``features_only``, a list
    of the chosen maps [B, 256·2^s, ceil(H / (4·2^s)), ceil(W / (4·2^s))] after stage s = 0..3. Every halving rounds up.

    A ``features_only`` model has no classifier and ends after its last map.
    """

    paper = "2103.06255"
    stages = (("stem", "layer1"), ("layer2",), ("layer3",), ("layer4",), ("head",))

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
            num_classes, in_chans, drop_path_rate, features_only, out_indices: see ``BackboneContract``.
        """
        depths = integers("depths", depths, 4, 0)
        maps = [(f"layer{stage + 1}", 256 * 2**stage, 4 * 2**stage) for stage in range(4)]
        super().__init__(maps, num_classes, in_chans, drop_path_rate, features_only, out_indices)
        stem_channels = 32
        self.stem = nn.Sequential(
            conv_bn_relu(self.in_chans, stem_channels, 3, stride=2),
            Involution2d(stem_channels, 3),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU(),
            conv_bn_relu(stem_channels, 64, 3),
        )
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        rates = self._drop_path_rates(sum(depths))
        channels = 64
        for stage in range(4):
            blocks = []
            for index in range(depths[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, 64 * 2**stage, stride, next(rates)))
                channels = 256 * 2**stage
            self.add_module(f"layer{stage + 1}", Stage(*blocks))
        if features_only:
            self._leave_out_unused()
        else:
            self.classifiers = {"head.fc": channels}
            self.head = nn.Sequential(OrderedDict(fc=self.make_classifier(channels, self.num_classes)))
        initialise(self, nn.Conv2d, nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
        initialise(self, nn.Linear, nn.init.normal_, std=0.01)
        for module in self.modules():
            if isinstance(module, Bottleneck):  # every block starts as its shortcut
                nn.init.zeros_(module.bn3.weight)

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        self._check_image(x)
        # Every layer keeps its input's memory format; 1×1 convolutions and involutions read whole pixels.
        x = self.maxpool(self.stem(to_channels_last(x)))
        maps = []
        for info in self.feature_info[: last + 1]:
            x = self.get_submodule(info["module"])(x)
            maps.append(x)
        return x, maps

    def folded(self) -> nn.Module:
        """Pools before the last bias and ReLU of the stem, which then see a quarter of the pixels."""
        self.maxpool = pool_first(self.stem, self.maxpool)
        return self

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, 2048, h, w] -> logits [B, num_classes], or the pooled features [B, 2048]."""
        x = x.mean((2, 3)) if self.global_pool else x
        return x if pre_logits else self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class InvolutionFPN(nn.Module):
    """Feature pyramid whose output layers are involutions (arXiv 1612.03144; arXiv 2103.06255, section 4.2).

        lateral[i] = 1×1(maps[i])                                                            i = 0..n-1, fine to coarse
        merged[i]  = lateral[i] + nearest(merged[i + 1])        merged[n - 1] = lateral[n - 1]
        out[i]     = involution(merged[i])                      out[n + j]    = out[n + j - 1] at every other pixel

    ``nearest`` enlarges to the size of its neighbour, which need not be a multiple of its own.

    Shapes: maps[i] [B, in_channels[i], H_i, W_i], sizes falling by about 2 -> ``num_outs`` maps [B, out_channels,
    H_i, W_i], each level beyond the given ones half the size of the one before it, rounded up::

        backbone = rednet50(features_only=True)
        neck = InvolutionFPN(backbone.feature_info.channels(), num_outs=5)
        pyramid = neck(backbone(image))                       # 256 channels at 1/4, 1/8, 1/16, 1/32 and 1/64

    Args:
        num_outs: number of outputs; None means one per map.
        kernel_size, group_channels, reduction: of the involutions, as in ``Involution2d``.

    Raises:
        ValueError: an option out of its range; in the forward pass, maps of other channels than ``in_channels``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        *,
        kernel_size: int = 7,
        group_channels: int = 16,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        self.in_channels = list(integers("in_channels", in_channels))
        out_channels = integer("out_channels", out_channels)
        self.num_outs = len(self.in_channels) if num_outs is None else integer("num_outs", num_outs)
        if self.num_outs < len(self.in_channels):
            raise ValueError(f"num_outs must be at least the number of maps, {len(in_channels)}, got {num_outs}")
        self.lateral_convs = nn.ModuleList(PointwiseConv2d(channels, out_channels) for channels in self.in_channels)
        self.fpn_convs = nn.ModuleList(
            Involution2d(out_channels, kernel_size, group_channels=group_channels, reduction=reduction)
            for _ in self.in_channels
        )
        initialise(self.lateral_convs, nn.Conv2d, nn.init.xavier_uniform_)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        channels = [x.shape[1] for x in maps]
        if channels != self.in_channels:
            raise ValueError(f"maps must be {len(self.in_channels)} of {self.in_channels} channels, got {channels}")
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            size = merged[i - 1].shape[2:]
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size, mode="nearest")
        outs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return outs


def _variant(size: int, depths: Sequence[int], published: Published | None = None) -> Callable[..., RedNet]:
    config = pretrained_config(crop_pct=0.875, interpolation="bilinear", first_conv="stem.0.conv", classifier="head.fc")
    return variant(RedNet, f"rednet{size}", f"RedNet-{size}", {"depths": depths}, config, published=published)


rednet26 = _variant(26, (1, 2, 4, 1), Published(9.23, 1.73, 75.96))
rednet38 = _variant(38, (2, 3, 5, 2), Published(12.39, 2.22, 77.48))
rednet50 = _variant(50, (3, 4, 6, 3), Published(15.54, 2.71, 78.35))
rednet101 = _variant(101, (3, 4, 23, 3), Published(25.65, 4.74, 78.92))
rednet152 = _variant(152, (3, 8, 36, 3), Published(33.98, 6.79, 79.12))
