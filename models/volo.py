"""VOLO D1 to D5: outlook attention on fine tokens, self-attention on coarse ones, class attention at the end.

"VOLO: Vision Outlooker for Visual Recognition", arXiv 2106.13112; class attention from arXiv 2103.17239,
token labelling and mix-token from arXiv 2104.10858. Entry names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models._contract import BackboneContract, FeatureInfo, pretrained_config
from models.checkpoints import load_pretrained
from models.layers import DropPath, OutlookAttention
from models.layers.basic import to_channels_last
from models.layers.outlook import check_heads
from models.registry import register_model

__all__ = ["VOLO", "OutlookAttention", "volo_d1", "volo_d2", "volo_d3", "volo_d4", "volo_d5"]

PATCH_SIZE = 8  # pixels a side of a fine token
DOWNSAMPLING = 2  # fine tokens a side of a coarse one


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q·kᵀ / √d)·v with d = C / heads: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        check_heads(dim, num_heads)
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = _split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class ClassAttention(nn.Module):
    """Attention with the class token as its only query: [B, 1 + N, C], class token first -> [B, 1, C]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        check_heads(dim, num_heads)
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.q = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        (query,) = _split_heads(self.q(x[:, :1]), 1, self.num_heads)
        key, value = _split_heads(self.kv(x), 2, self.num_heads)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[B, N, parts·C] -> ``parts`` views [B, heads, N, C / heads]."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """W₂·GELU(W₁·x) over the last dimension."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attn(LN(x)), then x + MLP(LN(x)): an Outlooker or a transformer block, as ``attn`` has it."""

    def __init__(self, attn: nn.Module, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(Block):
    """The same for the class token alone, which attends to all tokens; the others pass unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.drop_path(self.attn(self.norm1(x)))
        token = token + self.drop_path(self.mlp(self.norm2(token)))
        return torch.cat((token, x[:, 1:]), 1)


class PatchEmbed(nn.Module):
    """Three convolutions at 1/2, then one token for every 8×8 pixels: [B, in_chans, H, W] -> [B, H / 8, W / 8, C]."""

    def __init__(self, in_chans: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel_size, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            conv = nn.Conv2d(channels, hidden, kernel_size, stride, kernel_size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, PATCH_SIZE // 2, PATCH_SIZE // 2)

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last convolutions are the faster ones and leave tokens with their channels side by side. Without that
        # every residual sum of the next stage would inherit channels-first strides, and every layer norm copy.
        x = to_channels_last(x)
        return self.proj(self.conv(x)).permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """One token for every 2×2: [B, H, W, C] -> [B, H // 2, W // 2, C']. An odd last row or column is left out."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, DOWNSAMPLING, DOWNSAMPLING)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class VOLO(BackboneContract):
    """Patch embedding, Outlookers at 1/8, three stages of transformer blocks at 1/16, class attention, two classifiers.

    What it returns, for images [B, in_chans, H, W]:

    * evaluation: head(class token) + 0.5·max over tokens of aux_head(token), [B, num_classes];
    * training: (class logits [B, num_classes], token logits [B, h·w, num_classes], mix box [4]) for token labelling,
      or with ``return_dense=False`` the same as in evaluation;
    * ``features_only``: the chosen maps, one at 1/8 and three at 1/16.

    Mix-token cuts one random box out of the fine tokens of each image and fills it with those of the image opposite in
    the batch (``x.flip(0)``), so that Outlookers already see the mixture. Token logits are put back before they are
    returned: entry b belongs to image b throughout and takes that image's own token labels. The class logits are of the
    mixture, image b for 1 − (box area) / (h·w) and image B − 1 − b for the rest. The box is an int64 tensor (top, left,
    bottom, right), half open, in coarse tokens; zeros without mix-token. It is drawn from torch's generator on the
    image's device, and stays there: no synchronisation.

    Sizes: any H, W >= 32. An image is padded with zeros below and to the right to a multiple of 8, giving
    ceil(H / 8) × ceil(W / 8) fine tokens and h × w = ⌊ceil(H / 8) / 2⌋ × ⌊ceil(W / 8) / 2⌋ coarse ones. The last of an
    odd number of fine rows reaches the coarse tokens through the Outlookers only, as in the published model, which
    multiples of 8 equal exactly. The position embedding is resized wherever h × w is not its own grid.

    A ``features_only`` model ends after its last map.
    """

    def __init__(
        self,
        layers: Sequence[int],
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        *,
        mlp_ratio: float = 3.0,
        stem_dim: int = 64,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        return_dense: bool = True,
        mix_token: bool = True,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            layers: Outlookers, then transformer blocks in each of three stages.
            embed_dims: channels of fine and of coarse tokens.
            num_heads: heads on fine and on coarse tokens.
            mlp_ratio: hidden channels of an MLP over its channels.
            stem_dim: channels of the patch embedding's convolutions.
            img_size: side in pixels, or (height, width), for which the position embedding is made. Others work too.
            num_classes: 0 leaves both classifiers out: the model then returns the class token.
            in_chans: channels of the image.
            drop_path_rate: probability of dropping the last transformer block's branches in training. Rates rise
                linearly with depth from 0 at the first Outlooker, but Outlookers themselves are never dropped.
            return_dense: return the triple above in training.
            mix_token: draw and mix a box in training; only with ``return_dense``.
            features_only: return feature maps instead of logits.
            out_indices: which maps, 0..3; a number means the last so many, None all.

        Raises:
            ValueError: an argument out of range, or ``out_indices`` without ``features_only``.
        """
        super().__init__(num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path_rate)
        for name, sequence, length in (
            ("layers", layers, 4),
            ("embed_dims", embed_dims, 2),
            ("num_heads", num_heads, 2),
        ):
            if len(sequence) != length or min(sequence) < 1:
                raise ValueError(f"{name} must be {length} positive numbers, got {tuple(sequence)}")
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices needs features_only=True, got out_indices={out_indices}")
        self.img_size = self._checked_size(img_size)
        self.features_only = features_only
        self.return_dense = return_dense
        self.mix_token = mix_token and return_dense
        coarse_patch = PATCH_SIZE * DOWNSAMPLING
        self.feature_info = FeatureInfo(
            [
                {"num_chs": embed_dims[0], "reduction": PATCH_SIZE, "module": "network.0"},
                *({"num_chs": embed_dims[1], "reduction": coarse_patch, "module": f"network.{i}"} for i in (2, 3, 4)),
            ]
        )
        self.out_indices = self.resolve_indices(out_indices, "out_indices")
        self.feature_info = FeatureInfo(self.feature_info[: self.out_indices[-1] + 1], self.out_indices)
        self.num_features = self.head_hidden_size = dim = self.feature_info[-1]["num_chs"]

        if len(self.feature_info) > 1:
            grid = [-(-side // PATCH_SIZE) // DOWNSAMPLING for side in self.img_size]
            self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
        if not features_only:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(in_chans, stem_dim, embed_dims[0])
        rates = torch.linspace(0, drop_path_rate, sum(layers), device="cpu").tolist()
        outlookers = [
            Block(OutlookAttention(embed_dims[0], num_heads[0]), embed_dims[0], mlp_ratio) for _ in range(layers[0])
        ]
        self.network = nn.ModuleList([nn.Sequential(*outlookers)])
        if len(self.feature_info) > 1:
            self.network.append(Downsample(embed_dims[0], dim))
        for stage in range(1, len(self.feature_info)):
            first = sum(layers[:stage])
            blocks = [
                Block(Attention(dim, num_heads[1]), dim, mlp_ratio, rate)
                for rate in rates[first : first + layers[stage]]
            ]
            self.network.append(nn.Sequential(*blocks))
        if not features_only:
            self.post_network = nn.ModuleList(
                [ClassBlock(ClassAttention(dim, num_heads[1]), dim, mlp_ratio) for _ in range(2)]
            )
            self.classifiers = {"head": dim, "aux_head": dim}
            self.aux_head = self.make_classifier(dim, num_classes) if num_classes else nn.Identity()
            self.norm = nn.LayerNorm(dim)
            self.head = self.make_classifier(dim, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normal 0.02 for linear maps, class token and position embedding; PyTorch's own for convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def _checked_size(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise TypeError(f"img_size must be an int or a pair of ints, got {img_size!r}")
        if min(size) < self.minimum_size:
            raise ValueError(f"img_size must be at least {self.minimum_size} pixels a side, got {img_size}")
        return size[0], size[1]

    def _embed(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> fine tokens [B, ceil(H / 8), ceil(W / 8), C]."""
        self._check_image(x)
        below, right = -x.shape[2] % PATCH_SIZE, -x.shape[3] % PATCH_SIZE
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.patch_embed(x)

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        return self._forward_tokens(self._embed(x), last)

    def _forward_tokens(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        """``_forward_stages`` from the fine tokens on; after the last stage of a classifier [B, 1 + h·w, C]."""
        for block in self.network[0].children():
            x = self._run(block, x)
        maps = [x.permute(0, 3, 1, 2)]
        if last == 0:
            return maps[0], maps
        x = self.network[1](x)
        grid = x.shape[1:3]
        x = (x + resize_position_embedding(self.pos_embed, (grid[0], grid[1]))).flatten(1, 2)
        for stage in self.network[2 : last + 2]:
            for block in stage.children():
                x = self._run(block, x)
            maps.append(x.transpose(1, 2).unflatten(2, grid))
        if self.features_only or last < 3:
            return maps[-1], maps
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        for block in self.post_network:
            x = self._run(block, x)
        return self.norm(x), maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, 1 + h·w, C], the class token first -> logits [B, num_classes], or the class token [B, C]."""
        token = x[:, 0]
        if pre_logits or self.num_classes == 0:
            return token
        return self.head(token) + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | tuple[Tensor, Tensor, Tensor]:
        if self.features_only:
            maps = self._forward_stages(x, self.out_indices[-1])[1]
            return [maps[index] for index in self.out_indices]
        if self.training and self.return_dense:
            return self._forward_token_labels(x)
        return self.forward_head(self.forward_features(x))

    def return_plain_logits(self) -> None:
        self.return_dense = self.mix_token = False

    def _forward_token_labels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._embed(x)
        grid = (x.shape[1] // DOWNSAMPLING, x.shape[2] // DOWNSAMPLING)
        if self.mix_token:
            box = random_box(*grid, x.device)
            x = mix_box(x, box * DOWNSAMPLING)
        else:
            box = torch.zeros(4, dtype=torch.int64, device=x.device)
        x = self._forward_tokens(x, 3)[0]
        token_logits = self.aux_head(x[:, 1:])
        if self.mix_token:
            token_logits = mix_box(token_logits.unflatten(1, grid), box).flatten(1, 2)
        return self.head(x[:, 0]), token_logits, box

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        # The class blocks rank behind network.4.
        class_blocks = [(rf"^post_network\.{index}\.", (5, index)) for index in range(2)]
        blocks = [(r"^network\.(\d+)\.(\d+)\.", None), (r"^network\.(\d+)", (0,)), *class_blocks]
        if coarse:
            blocks = [(r"^network\.(\d+)", None), (r"^post_network", (5,))]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters(recurse=False)}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out the stages that a ``features_only`` model ends before."""
        absent = tuple(f"network.{index}." for index in range(len(self.network), 5))
        return {name: tensor for name, tensor in state.items() if not name.startswith(absent)}


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, h, w, C] -> [1, *grid, C]: bicubic over pixel areas (``align_corners=False``), without antialiasing."""
    if embedding.shape[1:3] == grid:
        return embedding
    return F.interpolate(embedding.permute(0, 3, 1, 2), grid, mode="bicubic").permute(0, 2, 3, 1)


def random_box(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """CutMix's box (arXiv 1905.04899, section 3.1): centre uniform, sides √(1 − λ) of the map's, λ ~ Beta(1, 1).

    Clipped at the border, hence sometimes smaller, or empty. int64 (top, left, bottom, right), half open.
    """
    share, *centres = torch.rand(3, device=device).unbind()  # Beta(1, 1) is the uniform distribution: share is 1 − λ
    starts, stops = [], []
    for centre, length in zip(centres, (height, width), strict=True):
        centre = (centre * length).long()
        half = (share.sqrt() * length).long() // 2
        starts.append((centre - half).clamp(min=0))
        stops.append((centre + half).clamp(max=length))
    return torch.stack((*starts, *stops))


def mix_box(x: Tensor, box: Tensor) -> Tensor:
    """Inside the box the tokens of the opposite batch entry, outside one's own: [B, H, W, C] -> [B, H, W, C].

    Its own inverse. A mask rather than a slice: the box never has to leave the device.
    """
    top, left, bottom, right = box.unbind()
    rows, columns = (torch.arange(length, device=x.device) for length in x.shape[1:3])
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return torch.where(inside[..., None], x.flip(0), x)


RELEASE = "https://github.com/sail-sg/volo/releases/download/volo_1"
# variant -> image side -> (file, share of the image's shorter side that the test crop takes)
WEIGHTS = {
    "d1": {224: ("d1_224_84.2", 0.96), 384: ("d1_384_85.2", 1.0)},
    "d2": {224: ("d2_224_85.2", 0.96), 384: ("d2_384_86.0", 1.0)},
    "d3": {224: ("d3_224_85.4", 0.96), 448: ("d3_448_86.3", 1.0)},
    "d4": {224: ("d4_224_85.7", 0.96), 448: ("d4_448_86.79", 1.15)},
    "d5": {224: ("d5_224_86.10", 0.96), 448: ("d5_448_87.0", 1.15), 512: ("d5_512_87.07", 1.15)},
}


def _pretrained_cfg(variant: str, img_size: tuple[int, int] = (224, 224)) -> dict[str, Any]:
    """The weights trained at ``img_size``, or at 224 where there are none."""
    height, width = img_size
    side = height if height == width and height in WEIGHTS[variant] else 224
    file, crop_pct = WEIGHTS[variant][side]
    return pretrained_config(
        url=f"{RELEASE}/{file}.pth.tar",
        input_size=(3, height, width),
        crop_pct=crop_pct,
        first_conv="patch_embed.conv.0",
        classifier=("head", "aux_head"),
    )


default_cfgs = {f"volo_{variant}": _pretrained_cfg(variant) for variant in WEIGHTS}


def _create(
    variant: str,
    layers: Sequence[int],
    embed_dims: Sequence[int],
    num_heads: Sequence[int],
    pretrained: bool,
    **kwargs: Any,
) -> VOLO:
    model = VOLO(layers, embed_dims, num_heads, **kwargs)
    model.pretrained_cfg = _pretrained_cfg(variant, model.img_size)
    if pretrained:
        load_pretrained(model, model.pretrained_cfg["url"])
    return model


@register_model
def volo_d1(pretrained: bool = False, **kwargs: Any) -> VOLO:
    """VOLO-D1: 26.6 M parameters, 6.8 G multiply-adds at 224², 84.2 % top-1 on ImageNet."""
    return _create("d1", (4, 4, 8, 2), (192, 384), (6, 12), pretrained, **kwargs)


@register_model
def volo_d2(pretrained: bool = False, **kwargs: Any) -> VOLO:
    """VOLO-D2: 58.7 M parameters, 85.2 % top-1 on ImageNet at 224²."""
    return _create("d2", (6, 4, 10, 4), (256, 512), (8, 16), pretrained, **kwargs)


@register_model
def volo_d3(pretrained: bool = False, **kwargs: Any) -> VOLO:
    """VOLO-D3: 86.3 M parameters, 85.4 % top-1 on ImageNet at 224²."""
    return _create("d3", (8, 8, 16, 4), (256, 512), (8, 16), pretrained, **kwargs)


@register_model
def volo_d4(pretrained: bool = False, **kwargs: Any) -> VOLO:
    """VOLO-D4: 193 M parameters, 85.7 % top-1 on ImageNet at 224²."""
    return _create("d4", (8, 8, 16, 4), (384, 768), (12, 16), pretrained, **kwargs)


@register_model
def volo_d5(pretrained: bool = False, **kwargs: Any) -> VOLO:
    """VOLO-D5: 295.5 M parameters, 86.1 % top-1 on ImageNet at 224²."""
    return _create("d5", (12, 12, 20, 4), (384, 768), (12, 16), pretrained, mlp_ratio=4.0, stem_dim=128, **kwargs)
