"""OverLoCK: an overview first, a close look next, with context-mixing dynamic kernels (arXiv 2502.20087, CVPR 2025).

Base-Net encodes the image down to 1/16, Overview-Net glances at it at 1/32, and Focus-Net looks again at 1/16 and
1/32 under the guidance of that glance: every position's convolution kernels are made from its affinity to the context.

State-dict names and shapes are those of the official release (LMMMEng/OverLoCK, Apache-2.0), whose weights load as
they are. Three defects of that code are not kept: its ``*_reparam`` models drop their keyword arguments and their S
and B sizes never load weights; a map smaller than the kernel can be enlarged to one pixel too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models._contract import BackboneContract, FeatureInfo, pretrained_config
from models.checkpoints import load_pretrained
from models.layers import (
    ContMix,
    DilatedReparamBlock,
    DropPath,
    GELU2d,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv2d,
    SqueezeExcite,
)
from models.layers.basic import to_channels_last
from models.registry import register_model

__all__ = [
    "OverLoCK",
    "overlock_b",
    "overlock_b_reparam",
    "overlock_s",
    "overlock_s_reparam",
    "overlock_t",
    "overlock_t_reparam",
    "overlock_xt",
    "overlock_xt_reparam",
]


def stem(in_chans: int, channels: int) -> nn.Sequential:
    """Image -> [B, channels, ⌈H/4⌉, ⌈W/4⌉]: four 3×3 convolutions, the first and the third with stride 2."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(in_chans, half, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half),
        GELU2d(),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        GELU2d(),
        nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        GELU2d(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    """[B, in_channels, H, W] -> [B, out_channels, ⌈H/2⌉, ⌈W/2⌉]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_channels)
    )


def feed_forward(channels: int, hidden: int) -> list[nn.Module]:
    """Channel MLP with a depthwise convolution and a response norm on its hidden units."""
    return [
        nn.Conv2d(channels, hidden, 1),
        GELU2d(),
        ResidualDepthwiseConv2d(hidden),
        GlobalResponseNorm(hidden),
        nn.Conv2d(hidden, channels, 1),
    ]


class RepConvBlock(nn.Module):
    """Base-Net and Overview-Net block: x ← x + dw₃(x), then ls(x) + drop_path(MLP(SE(BN(dilated reparam_K(LN(x)))))).

    Args:
        channels: of input and output, [B, channels, H, W].
        kernel_size: K.
        mlp_ratio: hidden width over ``channels``.
        drop_path: rate of stochastic depth.
        residual_scale: give the residual a layer scale.
        reparam: build the merged form.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        mlp_ratio: int = 4,
        drop_path: float = 0.0,
        residual_scale: bool = False,
        reparam: bool = False,
    ) -> None:
        super().__init__()
        self.dwconv = ResidualDepthwiseConv2d(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels, eps=1e-6),
            DilatedReparamBlock(channels, kernel_size, merged=reparam),
            nn.BatchNorm2d(channels),
            SqueezeExcite(channels),
            *feed_forward(channels, mlp_ratio * channels),
            DropPath(drop_path),
        )
        self.ls = LayerScale(channels) if residual_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class DynamicConvBlock(ContMix):
    """Focus-Net block: mixes features x under the guidance of the context h, and updates both.

    A ``ContMix`` by inheritance because the official names put its parameters directly in the block.

    Args:
        channels: d of x [B, d, H, W].
        context_channels: c of h [B, c, H, W].
        kernel_size: K, for both the dynamic and the static large kernel.
        num_heads: G of the dynamic kernels.
        mlp_ratio: hidden width over d.
        drop_path: rate of stochastic depth.
        first: h is the reference itself as yet, so there is nothing to renew it from.
        reparam: build the merged form.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        kernel_size: int,
        num_heads: int,
        *,
        mlp_ratio: int = 3,
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
        self.fusion = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
            GELU2d(),
            nn.Conv2d(width, channels, 1),
            GlobalResponseNorm(channels),
        )
        self.dyconv_proj = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.lepe = nn.Sequential(DilatedReparamBlock(channels, kernel_size, merged=reparam), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcite(channels)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1))
        self.dwconv2 = ResidualDepthwiseConv2d(width)
        self.norm2 = LayerNorm2d(width, eps=1e-6)
        self.mlp = nn.Sequential(*feed_forward(width, mlp_ratio * channels))
        self.ls1 = LayerScale(width)
        self.ls2 = LayerScale(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, h: Tensor, h_reference: Tensor) -> Tensor:
        """x [B, d, H, W], h and h_reference [B, c, H, W] -> new x and h, one above the other: [B, d + c, H, W]."""
        if self.x_scale is not None and self.h_scale is not None:
            h = self.x_scale(h) + self.h_scale(h_reference)
        residual = self.dwconv1(torch.cat((x, h), 1))
        features = self.norm1(residual)
        x = self.fusion(features)
        mixed = self.dyconv_proj(super().forward(x, features)) + self.lepe(x)
        x = self.ls1(residual) + self.drop_path(self.proj(self.se_layer(mixed) * self.gate(x)))
        x = self.dwconv2(x)
        return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))


class ContextDownsample(nn.Module):
    """Halves the features and the context that goes with them, each by its own strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, context_channels: int) -> None:
        super().__init__()
        self.x_proj = downsample(in_channels, out_channels)
        self.h_proj = downsample(context_channels, context_channels)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_proj(x), self.h_proj(h)


class OverLoCK(BackboneContract):
    """OverLoCK classifier, or backbone for dense prediction.

    A classifier returns logits [B, num_classes]; while training dict(main=…, aux=…), the second from Overview-Net,
    unless ``return_plain_logits`` was called.
    With ``features_only`` the model is the official dense-prediction backbone and returns the chosen of four maps,
    [B, C, H, W] at 1/4, 1/8, 1/16 and 1/32 (each size rounded up), layer-normed.

    Args:
        depth: blocks of the stages 1-3 (Base-Net) and 4 (Overview-Net).
        sub_depth: blocks of Focus-Net at 1/16 and 1/32.
        embed_dim: channels of the stages 1-4.
        sub_num_heads: heads of Focus-Net's two stages; each counts for two groups of dynamic kernels.
        kernel_size: of the large kernels of the stages 1-4; Focus-Net uses the last two.
        num_classes: outputs of the classifiers; 0 leaves them away, and pooled features are returned.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        features_only: build the dense-prediction backbone.
        out_indices: which maps that returns; None all four.
        reparam: build the inference form, in which dilated branches are merged (see ``OverLoCK.reparam``).
    """

    def __init__(
        self,
        *,
        depth: Sequence[int],
        sub_depth: Sequence[int],
        embed_dim: Sequence[int],
        sub_num_heads: Sequence[int],
        kernel_size: Sequence[int] = (17, 15, 13, 7),
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        reparam: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path_rate)
        d0, d1, d2, d3 = embed_dim
        context = d3 // 4
        self.num_features = d3 + context
        self.head_hidden_size = 1024
        self.features_only = features_only
        self.return_aux = True
        maps = (("blocks1", d0), ("blocks2", d1), ("sub_blocks3", d2 + context), ("sub_blocks4", d3 + context))
        self.feature_info = FeatureInfo(
            {"num_chs": channels, "reduction": 4 * 2**i, "module": module} for i, (module, channels) in enumerate(maps)
        )
        self.out_indices = self.resolve_indices(out_indices, "out_indices")
        self.feature_info = FeatureInfo(self.feature_info, self.out_indices)
        if not features_only and out_indices is not None:
            raise ValueError(f"out_indices needs features_only=True, got out_indices={tuple(out_indices)} without it")

        total = sum(depth) + sum(sub_depth)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])

        def base_blocks(stage: int) -> nn.ModuleList:
            return nn.ModuleList(
                RepConvBlock(
                    embed_dim[stage],
                    kernel_size[stage],
                    drop_path=next(rates),
                    residual_scale=stage >= 2,
                    reparam=reparam,
                )
                for _ in range(depth[stage])
            )

        def focus_blocks(stage: int) -> nn.ModuleList:
            return nn.ModuleList(
                DynamicConvBlock(
                    embed_dim[2 + stage],
                    context,
                    kernel_size[2 + stage],
                    2 * sub_num_heads[stage],
                    drop_path=next(rates),
                    first=stage == 0 and block == 0,
                    reparam=reparam,
                )
                for block in range(sub_depth[stage])
            )

        self.patch_embed1 = stem(in_chans, d0)
        self.patch_embed2 = downsample(d0, d1)
        self.patch_embed3 = downsample(d1, d2)
        self.patch_embed4 = downsample(d2, d3)
        self.high_level_proj = nn.Conv2d(d3, context, 1)
        self.patch_embedx = ContextDownsample(d2, d3, context)
        self.blocks1 = base_blocks(0)
        self.blocks2 = base_blocks(1)
        self.blocks3 = base_blocks(2)
        self.blocks4 = base_blocks(3)
        self.sub_blocks3 = focus_blocks(0)
        self.sub_blocks4 = focus_blocks(1)
        if features_only:
            self.h_proj = nn.Sequential(nn.Conv2d(d3, d3 + context, 1), LayerScale(d3 + context, initial=1e-5))
            widths = (d0, d1, d2 + context, d3 + context, d3)
            self.extra_norm = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in widths)
        else:
            self.classifiers = {"head.4": self.head_hidden_size, "aux_head.2": d3}
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(d3), nn.AdaptiveAvgPool2d(1), self.make_classifier(d3, num_classes)
            )
            self.head = nn.Sequential(
                nn.Conv2d(d3 + context, self.head_hidden_size, 1, bias=False),
                nn.BatchNorm2d(self.head_hidden_size),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                self.make_classifier(self.head_hidden_size, num_classes),
            )
        self.apply(_initialise)

    @staticmethod
    def make_classifier(in_features: int, num_classes: int) -> nn.Module:
        return nn.Conv2d(in_features, num_classes, 1) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor] | list[Tensor]:
        if self.features_only:
            maps = self._forward_stages(x, max(self.out_indices))[1]
            return [maps[i] for i in self.out_indices]
        features, _, context = self._overview_and_focus(x, 3)
        main = self.forward_head(features)
        if self.training and self.return_aux:
            return {"main": main, "aux": self.aux_head(context).flatten(1)}
        return main

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        if not self.return_aux:
            self.return_plain_logits()

    def return_plain_logits(self) -> None:
        self.return_aux = False
        if not self.features_only:
            self.aux_head.requires_grad_(False)  # DistributedDataParallel waits for every gradient that is required

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, 1.25·d3, h, w] -> logits [B, num_classes], or the pooled [B, 1024] before them."""
        expand, norm, activation, pool, classifier = self.head
        x = pool(activation(norm(expand(x))))
        return (x if pre_logits else classifier(x)).flatten(1)

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        features, maps, context = self._overview_and_focus(x, last)
        if self.features_only:
            maps = [norm(m) for norm, m in zip(self.extra_norm, maps, strict=False)]
            if last == 3:
                maps[3] = maps[3] + self.h_proj(self.extra_norm[4](context))
        return features, maps

    def _overview_and_focus(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Runs up to feature map ``last``: the features by then, the maps 0..last, and Overview-Net's [B, d3, h, w]."""
        self._check_image(x)
        # Layer norms and 1×1 convolutions read whole pixels; every layer keeps the format it is given. An image of one
        # channel has both formats at once, hence the second call.
        x = to_channels_last(x)
        maps = []
        for embed, blocks in ((self.patch_embed1, self.blocks1), (self.patch_embed2, self.blocks2)):
            x = to_channels_last(embed(x))
            for block in blocks:
                x = self._run(block, x)
            maps.append(x)
            if last < len(maps):
                return x, maps, x
        x = self.patch_embed3(x)
        for block in self.blocks3:
            x = self._run(block, x)
        context = self.patch_embed4(x)
        for block in self.blocks4:
            context = self._run(block, context)

        reference = self.high_level_proj(context)
        h = enlarged = F.interpolate(reference, x.shape[2:], mode="bilinear").to(reference.dtype)
        for block in self.sub_blocks3:
            features = self._run(block, x, h, enlarged)
            x, h = features.split((block.channels, block.context_channels), 1)
        maps.append(features)
        if last == 2:
            return features, maps, context
        x, h = self.patch_embedx(x, h)
        for block in self.sub_blocks4:
            features = self._run(block, x, h, reference)
            x, h = features.split((block.channels, block.context_channels), 1)
        maps.append(features)
        return features, maps, context

    def reparam(self) -> OverLoCK:
        """Merges every dilated branch into its large kernel, in place: the ``*_reparam`` form, with the same logits.

        Final: the batch norms' running statistics are part of the merged kernels from here on.
        """
        for module in self.modules():
            if isinstance(module, DilatedReparamBlock):
                module.merge()
        return self

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Separate branches merged for a ``*_reparam`` model; a classifier's weights for the dense-prediction backbone.

        What no classifier has keeps its present values in the backbone.
        """
        state = dict(state)
        for prefix, module in self.named_modules():
            if isinstance(module, DilatedReparamBlock) and module.merged:
                _merge_branches(state, f"{prefix}.", module)
        dense_only = {name: t for name, t in self.state_dict().items() if name.startswith(("h_proj.", "extra_norm."))}
        return state if any(name in state for name in dense_only) else state | dense_only

    def no_weight_decay(self) -> set[str]:
        """Relative position biases, and the scales and shifts that are not stored as vectors."""
        kept = {"rpb1", "rpb2", "gamma", "beta"}
        names = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in kept}
        return names | {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, LayerScale)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        block, first = ("", ()) if coarse else (r"\.(\d+)", (0,))  # a downsampling belongs to the block after it
        return {
            "stem": r"^patch_embed1",
            "base": [(rf"^blocks(\d){block}", None), (r"^patch_embed(\d)", first)],
            "focus": [
                (rf"^sub_blocks(\d){block}", None),
                (r"^high_level_proj", (3, *first)),
                (r"^patch_embedx", (4, *first)),
            ],
        }


def _merge_branches(state: dict[str, Tensor], prefix: str, block: DilatedReparamBlock) -> None:
    """Puts the merged kernel and bias of ``block`` in the place of its separate branches, where ``state`` has these."""
    separate = DilatedReparamBlock(block.channels, block.kernel_size).double()
    branches = {name: state.get(prefix + name) for name in separate.state_dict()}
    found = {name: tensor for name, tensor in branches.items() if tensor is not None}
    if any(name not in found or found[name].shape != t.shape for name, t in separate.state_dict().items()):
        return  # merged already, or not a file for this model: the loader's to judge
    separate.load_state_dict(found)
    separate.merge()
    for name in found:
        del state[prefix + name]
    state.update((prefix + name, tensor) for name, tensor in separate.state_dict().items())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    "xt": {
        "depth": (2, 2, 3, 2),
        "sub_depth": (6, 2),
        "embed_dim": (56, 112, 256, 336),
        "sub_num_heads": (4, 6),
        "drop_path_rate": 0.1,
    },
    "t": {
        "depth": (4, 4, 6, 2),
        "sub_depth": (12, 2),
        "embed_dim": (64, 128, 256, 512),
        "sub_num_heads": (4, 8),
        "drop_path_rate": 0.15,
    },
    "s": {
        "depth": (6, 6, 8, 3),
        "sub_depth": (16, 3),
        "embed_dim": (64, 128, 320, 512),
        "sub_num_heads": (8, 16),
        "drop_path_rate": 0.4,
    },
    "b": {
        "depth": (8, 8, 10, 4),
        "sub_depth": (20, 4),
        "embed_dim": (80, 160, 384, 576),
        "sub_num_heads": (6, 9),
        "drop_path_rate": 0.5,
    },
}

RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1"


default_cfgs = {
    f"overlock_{variant}{form}": pretrained_config(
        url=f"{RELEASE}/overlock_{variant}_in1k_224{form}.pth",
        classifier=("head.4", "aux_head.2"),
        first_conv="patch_embed1.0",
    )
    for variant in VARIANTS
    for form in ("", "_reparam")
}


def _overlock(variant: str, pretrained: bool, reparam: bool = False, **kwargs: Any) -> OverLoCK:
    model = OverLoCK(**{**VARIANTS[variant], **kwargs}, reparam=reparam)
    model.pretrained_cfg = dict(default_cfgs[f"overlock_{variant}{'_reparam' if reparam else ''}"])
    if pretrained:
        load_pretrained(model, model.pretrained_cfg["url"])
    return model


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT: 16 M parameters, 2.6 GMAC at 224², ImageNet-1k top-1 82.7 %."""
    return _overlock("xt", pretrained, **kwargs)


@register_model
def overlock_xt_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """``overlock_xt`` with its dilated branches merged, for inference."""
    return _overlock("xt", pretrained, reparam=True, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T: 33 M parameters, 5.5 GMAC at 224², ImageNet-1k top-1 84.2 %."""
    return _overlock("t", pretrained, **kwargs)


@register_model
def overlock_t_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """``overlock_t`` with its dilated branches merged, for inference."""
    return _overlock("t", pretrained, reparam=True, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S: 56 M parameters, 9.7 GMAC at 224², ImageNet-1k top-1 84.8 %."""
    return _overlock("s", pretrained, **kwargs)


@register_model
def overlock_s_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """``overlock_s`` with its dilated branches merged, for inference."""
    return _overlock("s", pretrained, reparam=True, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B: 95 M parameters, 16.7 GMAC at 224², ImageNet-1k top-1 85.1 %."""
    return _overlock("b", pretrained, **kwargs)


@register_model
def overlock_b_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """``overlock_b`` with its dilated branches merged, for inference."""
    return _overlock("b", pretrained, reparam=True, **kwargs)
