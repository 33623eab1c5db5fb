"""OverLoCK: first an overview, then a close look, with context-mixing dynamic kernels (arXiv 2502.20087, CVPR 2025).

Base-Net encodes the image down to 1/16, Overview-Net glances at it at 1/32, and Focus-Net looks again at 1/16 and
1/32 under the guidance of that glance: every position's convolution kernels come from its affinity to the context.

State-dict names and shapes are those of the official release (LMMMEng/OverLoCK, Apache-2.0), whose weights load
unchanged. Three defects of that code are mended: its ``*_reparam`` models drop their keyword arguments, their S and B
sizes never load weights, and a map smaller than the kernel can be enlarged to one pixel too few.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models._contract import BackboneContract, Stage, pretrained_config
from models.checks import flag, integers
from models.layers import DilatedReparamBlock, LayerNorm2d, LayerScale, PointwiseConv2d
from models.layers.basic import initialise, to_channels_last
from models.layers.overlock_blocks import ContextDownsample, DynamicConvBlock, RepConvBlock, downsample, stem
from models.registry import Published, variant


class OverLoCK(BackboneContract):
    """OverLoCK classifier, or backbone for dense prediction.

    A classifier returns logits [B, num_classes]; in training it returns dict(main=…, aux=…), the second from
    Overview-Net, unless ``return_plain_logits`` was called.
    With ``features_only`` the model is the official dense-prediction backbone and returns the chosen of four maps,
    [B, C, H, W] at 1/4, 1/8, 1/16 and 1/32 (each size rounded up), layer-normed:

        [LN₀(blocks1), LN₁(blocks2), LN₂(sub_blocks3), LN₃(sub_blocks4) + h_proj(LN₄(blocks4))]

    Its third stage takes the output of LN₁, a classifier's that of blocks2. Official detection backbones have this
    form; official segmentation backbones end in LN₃ alone (``context_skip=False``).

    Args:
        depth: blocks of the stages 1-3 (Base-Net) and 4 (Overview-Net).
        sub_depth: blocks of Focus-Net at 1/16 and 1/32.
        embed_dim: channels of the stages 1-4.
        sub_num_heads: heads of Focus-Net's two stages; each counts for two groups of dynamic kernels.
        kernel_size: of the large kernels of the stages 1-4; Focus-Net uses the last two.
        num_classes, in_chans, drop_path_rate, features_only, out_indices: see ``BackboneContract``.
        context_skip: with ``features_only``, add the overview to the last map.
        reparam: build the inference form, in which dilated branches are merged (see ``OverLoCK.reparam``).
    """

    paper = "2502.20087"
    training_only = ("aux_head",)
    stages = (
        ("patch_embed1", "blocks1"),
        ("patch_embed2", "blocks2"),
        ("patch_embed3", "blocks3", "patch_embed4", "blocks4", "high_level_proj", "sub_blocks3"),
        ("patch_embedx", "sub_blocks4"),
        ("head", "aux_head"),
    )

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
        out_indices: int | Sequence[int] | None = None,
        context_skip: bool = True,
        reparam: bool = False,
    ) -> None:
        depth, sub_depth = integers("depth", depth, 4, 0), integers("sub_depth", sub_depth, 2, 0)
        d0, d1, d2, d3 = embed_dim = integers("embed_dim", embed_dim, 4, 2)
        sub_num_heads = integers("sub_num_heads", sub_num_heads, 2)
        kernel_size = integers("kernel_size", kernel_size, 4)
        for i, (width, heads) in enumerate(zip(embed_dim[2:], sub_num_heads, strict=True)):
            if width % (4 * heads):
                raise ValueError(f"embed_dim[{2 + i}] must be a multiple of 4·sub_num_heads[{i}], got {width}, {heads}")
        reparam, context = flag("reparam", reparam), d3 // 4
        widths = d0, d1, d2 + context, d3 + context
        maps = list(zip(("blocks1", "blocks2", "sub_blocks3", "sub_blocks4"), widths, (4, 8, 16, 32), strict=True))
        super().__init__(maps, num_classes, in_chans, drop_path_rate, features_only, out_indices)
        if not flag("context_skip", context_skip) and not features_only:
            raise ValueError("context_skip=False needs features_only=True: a classifier returns no maps")
        self.return_aux = True
        rates = self._drop_path_rates(sum(depth) + sum(sub_depth))

        def base_stage(i: int) -> Stage:
            shape, options = (embed_dim[i], kernel_size[i]), {"residual_scale": i >= 2, "reparam": reparam}
            return Stage(*(RepConvBlock(*shape, drop_path=next(rates), **options) for _ in range(depth[i])))

        def focus_stage(i: int) -> Stage:
            shape = (embed_dim[2 + i], context, kernel_size[2 + i], 2 * sub_num_heads[i])
            first = [i == 0 and block == 0 for block in range(sub_depth[i])]
            return Stage(*(DynamicConvBlock(*shape, drop_path=next(rates), first=f, reparam=reparam) for f in first))

        self.patch_embed1 = stem(self.in_chans, d0)
        self.patch_embed2 = downsample(d0, d1)
        self.patch_embed3 = downsample(d1, d2)
        self.patch_embed4 = downsample(d2, d3)
        self.high_level_proj = PointwiseConv2d(d3, context)
        self.patch_embedx = ContextDownsample(d2, d3, context)
        self.blocks1, self.blocks2, self.blocks3, self.blocks4 = map(base_stage, range(4))
        self.sub_blocks3, self.sub_blocks4 = map(focus_stage, range(2))
        self.extra_norm = nn.ModuleList(nn.Identity() for _ in range(5))
        self.h_proj: nn.Module | None = None
        if features_only:
            self._norm_maps((*widths, d3), context_skip)
            self._leave_out_unused()
        else:
            self.head_hidden_size = hidden = 1024
            self.classifiers = {"head.4": hidden, "aux_head.2": d3}
            classify = self.make_classifier(d3, self.num_classes)
            self.aux_head = nn.Sequential(nn.BatchNorm2d(d3), nn.AdaptiveAvgPool2d(1), classify)
            self.head = nn.Sequential(
                PointwiseConv2d(d3 + context, hidden, bias=False),
                nn.BatchNorm2d(hidden),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                self.make_classifier(hidden, self.num_classes),
            )
        initialise(self, nn.Conv2d, nn.init.trunc_normal_, std=0.02)

    def _norm_maps(self, widths: Sequence[int], context_skip: bool) -> None:
        """Norms for the chosen maps, of these widths; the fifth is for the context that is added to the last map."""
        last = self.out_indices[-1]
        context_skip = context_skip and last == 3
        wanted = {*self.out_indices, *([1] if last > 1 else []), *([4] if context_skip else [])}
        for i in wanted:
            self.extra_norm[i] = LayerNorm2d(widths[i], eps=1e-6)
        self.left_out += [f"extra_norm.{i}" for i in range(5) if i not in wanted]
        if context_skip:
            self.h_proj = nn.Sequential(PointwiseConv2d(widths[4], widths[3]), LayerScale(widths[3], initial=1e-5))
        else:
            self.left_out.append("h_proj")

    @staticmethod
    def make_classifier(in_features: int, num_classes: int) -> nn.Module:
        return nn.Conv2d(in_features, num_classes, 1) if num_classes else nn.Identity()

    # ---- base, overview, focus

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor] | list[Tensor]:
        if not self.classifiers:
            return super().forward(x)
        x = self.forward_base(x)[-1]
        context = self.forward_overview(x)
        main = self.forward_head(self.forward_focus(x, context)[-1])
        if self.training and self.return_aux:
            return {"main": main, "aux": self._flat(self.aux_head(context))}
        return main

    def forward_base(self, x: Tensor, last: int = 3) -> list[Tensor]:
        """Base-Net: image -> maps at 1/4, 1/8 and 1/16, as many as feature map ``last`` needs."""
        self._check_image(x)
        # Layer norms and 1×1 convolutions read whole pixels; every layer keeps its input's memory format. An image of
        # one channel has both formats at once, hence the second call.
        x = self.blocks1(to_channels_last(self.patch_embed1(to_channels_last(x))))
        maps = [self.extra_norm[0](x)]
        if last > 0:
            x = self.extra_norm[1](self.blocks2(to_channels_last(self.patch_embed2(x))))
            maps.append(x)
        if last > 1:
            maps.append(self.blocks3(self.patch_embed3(x)))
        return maps

    def forward_overview(self, x: Tensor) -> Tensor:
        """Overview-Net: Base-Net's map at 1/16 -> the context [B, d3, H/32, W/32]."""
        return self.blocks4(self.patch_embed4(x))

    def forward_focus(self, x: Tensor, context: Tensor, last: int = 3) -> list[Tensor]:
        """Focus-Net: Base-Net's map at 1/16 and the context -> feature maps 2 and, where ``last`` is 3, 3."""
        reference = self.high_level_proj(context)
        enlarged = F.interpolate(reference, x.shape[2:], mode="bilinear").to(reference.dtype)
        features = self.sub_blocks3(torch.cat((x, enlarged), 1), enlarged)
        maps = [self.extra_norm[2](features)]
        if last > 2:
            x, h = features.split((x.shape[1], enlarged.shape[1]), 1)
            features = self.sub_blocks4(torch.cat(self.patch_embedx(x, h), 1), reference)
            x = self.extra_norm[3](features)
            maps.append(x if self.h_proj is None else x + self.h_proj(self.extra_norm[4](context)))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, 1.25·d3, h, w] -> logits [B, num_classes], or the pooled [B, 1024] before them."""
        return self._flat(self.head[:-1](x) if pre_logits else self.head(x))

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.global_pool else x

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        maps = self.forward_base(x, last)
        if last > 1:
            x = maps.pop()
            maps += self.forward_focus(x, self.forward_overview(x), last)
        return maps[-1], maps

    # ---- what is this family's own

    def set_global_pool(self, global_pool: str, num_classes: int | None = None) -> None:
        super().set_global_pool(global_pool, num_classes)
        for name, index in (("head", 3), ("aux_head", 1)):
            if hasattr(self, name):
                getattr(self, name)[index] = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if not self.return_aux:
            self.return_plain_logits()

    def return_plain_logits(self) -> None:
        self.return_aux = False
        if self.classifiers:
            self.aux_head.requires_grad_(False)  # DistributedDataParallel waits for every gradient that is required

    def reparam(self) -> "OverLoCK":
        """Merges every dilated branch into its large kernel, in place: the ``*_reparam`` form, with the same logits.

        This cannot be undone: the batch norms' running statistics become a part of the merged kernels.
        """
        for module in self.modules():
            if isinstance(module, DilatedReparamBlock):
                module.merge()
        return self

    def folded(self) -> nn.Module:
        """Removes the second output of training."""
        if self.classifiers.pop("aux_head.2", None):
            del self.aux_head
        return self

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merges the branches for a ``*_reparam`` model, and accepts files of other forms where they can serve.

        A classifier's file serves either backbone, and a segmentation backbone's file a detection backbone: norms and
        projections that the file lacks keep their present values, and a warning names them.

        Raises:
            ValueError: a backbone's file for a classifier, or a detection backbone's for a segmentation backbone.
        """
        fits = "it fits OverLoCK with features_only=True"
        if self.classifiers and any(name.startswith("extra_norm.") for name in state):
            raise ValueError(f"checkpoint: the file is a dense-prediction backbone's, whose maps are normed; {fits}")
        if self.features_only and 3 in self.out_indices and self.h_proj is None and "h_proj.0.weight" in state:
            raise ValueError(f"checkpoint: the file is a detection backbone's, with h_proj; {fits}, context_skip=True")
        state = super().adapt_state_dict(state)
        for prefix, module in self.named_modules():
            if isinstance(module, DilatedReparamBlock) and module.merged:
                module.merge_entries(state, f"{prefix}.")
        for part in (tuple(f"extra_norm.{i}." for i in range(4)), ("h_proj.", "extra_norm.4.")):
            own = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(part)}
            if own and not any(name.startswith(part) for name in state):
                modules = ", ".join(sorted({name.rpartition(".")[0] for name in own}))
                warnings.warn(f"{modules} keep their initial values: the file has none", stacklevel=2)
                state.update(own)
        return state

    def no_weight_decay(self) -> set[str]:
        """Relative position biases, and scales and shifts that are not stored as vectors."""
        names = {name for name, _ in self.named_parameters() if name.endswith((".rpb1", ".rpb2", ".gamma", ".beta"))}
        return names | {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, LayerScale)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        block, first = ("", ()) if coarse else (r"\.(\d+)", (0,))  # a downsampling counts with the block after it
        guides = [(r"^high_level_proj", (3, *first)), (r"^patch_embedx", (4, *first))]
        return {
            "stem": r"^patch_embed1",
            "base": [(rf"^blocks(\d){block}", None), (r"^patch_embed(\d)", first)],
            "focus": [(rf"^sub_blocks(\d){block}", None), *guides],
        }


VARIANTS: dict[str, tuple[Any, ...]] = {  # size -> its options, and what is published of it
    "xt": ((2, 2, 3, 2), (6, 2), (56, 112, 256, 336), (4, 6), 0.1, Published(16, 2.6, 82.7)),
    "t": ((4, 4, 6, 2), (12, 2), (64, 128, 256, 512), (4, 8), 0.15, Published(33, 5.5, 84.2)),
    "s": ((6, 6, 8, 3), (16, 3), (64, 128, 320, 512), (8, 16), 0.4, Published(56, 9.7, 84.8)),
    "b": ((8, 8, 10, 4), (20, 4), (80, 160, 384, 576), (6, 9), 0.5, Published(95, 16.7, 85.1)),
}


def _variant(size: str, form: str = "") -> Callable[..., OverLoCK]:
    title = f"OverLoCK-{size.upper()}{', its dilated branches merged for inference' if form else ''}"
    url = f"https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_{size}_in1k_224{form}.pth"
    config = pretrained_config(url=url, classifier=("head.4", "aux_head.2"), first_conv="patch_embed1.0")
    *values, published = VARIANTS[size]
    options: dict[str, Any] = {"reparam": bool(form)}
    options.update(zip(("depth", "sub_depth", "embed_dim", "sub_num_heads", "drop_path_rate"), values, strict=True))
    return variant(OverLoCK, f"overlock_{size}{form}", title, options, config, published=published)


overlock_xt, overlock_t, overlock_s, overlock_b = map(_variant, VARIANTS)
overlock_xt_reparam, overlock_t_reparam, overlock_s_reparam, overlock_b_reparam = (
    _variant(size, "_reparam") for size in VARIANTS
)
