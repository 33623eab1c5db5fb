"""VOLO D1 to D5: outlook attention on fine tokens, self-attention on coarse ones, class attention at the end.

"VOLO: Vision Outlooker for Visual Recognition", arXiv 2106.13112; class attention from arXiv 2103.17239,
token labelling and mix-token from arXiv 2104.10858. Entry names are those of the published checkpoints.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models._contract import BackboneContract, Stage, pretrained_config
from models.checks import flag, integer, integers, number
from models.layers import OutlookAttention
from models.layers.basic import initialise, to_channels_last
from models.layers.pointwise import PaddedConv2d
from models.layers.tokens import (
    Attention,
    Block,
    ClassAttention,
    ClassBlock,
    mix_box,
    random_box,
    resize_position_embedding,
)
from models.registry import Published, variant

PATCH_SIZE = 8  # pixels per side of a fine token
DOWNSAMPLING = 2  # fine tokens per side of a coarse one
for _function in ("mix_box", "random_box", "resize_position_embedding"):
    fx.wrap(_function)  # torch.fx records a call, since their steps depend on sizes


class PatchEmbed(nn.Module):
    """Three convolutions at 1/2, then one token for every 8×8 pixels: [B, in_chans, H, W] -> [B, H / 8, W / 8, C]."""

    def __init__(self, in_chans: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel_size, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            conv = PaddedConv2d(channels, hidden, kernel_size, stride, kernel_size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, PATCH_SIZE // 2, PATCH_SIZE // 2)

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last convolutions are faster and leave a token's channels side by side in memory. Otherwise every
        # residual sum of the next stage would inherit channels-first strides, and every layer norm would copy.
        x = to_channels_last(x)
        return self.proj(self.conv(x)).permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """One token for every 2×2: [B, H, W, C] -> [B, H // 2, W // 2, C']. An odd last row or column is dropped."""

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
    image's device and stays there, so nothing waits for the device.

    Sizes: any H, W >= 32. An image is padded with zeros below and to the right to a multiple of 8, giving
    ceil(H / 8) × ceil(W / 8) fine tokens and h × w = ⌊ceil(H / 8) / 2⌋ × ⌊ceil(W / 8) / 2⌋ coarse ones. The last of an
    odd number of fine rows reaches the coarse tokens through the Outlookers only, as in the published model, which
    multiples of 8 equal exactly. The position embedding is resized wherever h × w is not its own grid.

    A ``features_only`` model ends after its last map.
    """

    paper = "2106.13112"
    fixed_input_size = True
    plain_options: ClassVar = {"return_dense": False}
    global_pools = ("token", "avg", "")
    stages = (
        ("patch_embed", "network.0"),
        ("pos_embed", "network.1", "network.2"),
        ("network.3",),
        ("network.4",),
        ("cls_token", "post_network", "norm", "head", "aux_head"),
    )

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
            embed_dims, num_heads: channels and heads on fine and on coarse tokens.
            mlp_ratio: hidden channels of an MLP over its channels.
            stem_dim: channels of the patch embedding's convolutions.
            img_size: side in pixels, or (height, width), of the position embedding. Other images work too.
            num_classes, in_chans, features_only, out_indices: see ``BackboneContract``.
            drop_path_rate: of the last transformer block in training; rates rise linearly from the first Outlooker on,
                but Outlookers themselves are never dropped.
            return_dense: return the triple above in training.
            mix_token: draw and mix a box in training; only with ``return_dense``.
        """
        layers = integers("layers", layers, 4)
        embed_dims, num_heads = integers("embed_dims", embed_dims, 2), integers("num_heads", num_heads, 2)
        fine, dim = embed_dims
        coarse_patch = PATCH_SIZE * DOWNSAMPLING
        maps = [("network.0", fine, PATCH_SIZE), *((f"network.{i}", dim, coarse_patch) for i in (2, 3, 4))]
        super().__init__(maps, num_classes, in_chans, drop_path_rate, features_only, out_indices)
        self.img_size, grid = self._grid(img_size)
        self.return_dense = flag("return_dense", return_dense)
        self.mix_token = flag("mix_token", mix_token) and self.return_dense
        mlp_ratio, stem_dim = number("mlp_ratio", mlp_ratio, 1 / min(embed_dims), 65), integer("stem_dim", stem_dim)

        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(self.in_chans, stem_dim, fine)
        rates = itertools.islice(self._drop_path_rates(sum(layers)), layers[0], None)
        outlookers = (Block(OutlookAttention(fine, num_heads[0]), fine, mlp_ratio) for _ in range(layers[0]))
        self.network = nn.ModuleList([Stage(*outlookers), Downsample(fine, dim)])
        for count in layers[1:]:
            blocks = (Block(Attention(dim, num_heads[1]), dim, mlp_ratio, next(rates)) for _ in range(count))
            self.network.append(Stage(*blocks))
        self.post_network = Stage(*(ClassBlock(ClassAttention(dim, num_heads[1]), dim, mlp_ratio) for _ in range(2)))
        self.classifiers = {"head": dim, "aux_head": dim}
        self.aux_head = self.make_classifier(dim, self.num_classes)
        self.norm = nn.LayerNorm(dim)
        self.head = self.make_classifier(dim, self.num_classes)
        if features_only:
            self._leave_out_unused()
        initialise(self, nn.Linear, nn.init.trunc_normal_, std=0.02)
        for parameter in self.parameters(recurse=False):  # class token and position embedding
            nn.init.trunc_normal_(parameter, std=0.02)

    def _grid(self, img_size: int | Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of an image, and of its coarse tokens."""
        sides = img_size if isinstance(img_size, Sequence) else (integer("img_size", img_size, *self.sides),) * 2
        height, width = integers("img_size", sides, 2, *self.sides)
        return (height, width), (-(-height // PATCH_SIZE) // DOWNSAMPLING, -(-width // PATCH_SIZE) // DOWNSAMPLING)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: Any = None) -> None:
        """Resizes the position embedding for another image size. ``patch_size`` is always 8."""
        if patch_size not in (None, PATCH_SIZE, (PATCH_SIZE, PATCH_SIZE)):
            raise ValueError(f"patch_size must be {PATCH_SIZE}, got {patch_size}")
        self.img_size, grid = self._grid(self.img_size if img_size is None else img_size)
        if "pos_embed" in self._parameters:
            resized = resize_position_embedding(self.pos_embed.detach(), grid).contiguous()
            self.pos_embed = nn.Parameter(resized, self.pos_embed.requires_grad)

    def _embed(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> fine tokens [B, ceil(H / 8), ceil(W / 8), C]."""
        self._check_image(x)
        return self.patch_embed(F.pad(x, (0, -x.shape[3] % PATCH_SIZE, 0, -x.shape[2] % PATCH_SIZE)))

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        return self._forward_tokens(self._embed(x), last)

    def _forward_tokens(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        """``_forward_stages`` from the fine tokens on; after the last stage of a classifier [B, 1 + h·w, C]."""
        x = self.network[0](x)
        maps = [x.permute(0, 3, 1, 2)]
        if last == 0:
            return maps[0], maps
        x = self.network[1](x)
        grid = (x.shape[1], x.shape[2])
        x = (x + resize_position_embedding(self.pos_embed, grid)).flatten(1, 2)
        for index in range(2, last + 2):
            x = self.network[index](x)
            maps.append(x.transpose(1, 2).unflatten(2, grid))
        if not self.classifiers or last < len(self.feature_info) - 1:
            return maps[-1], maps
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        return self.norm(self.post_network(x)), maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, 1 + h·w, C], the class token first -> logits [B, num_classes], or what ``global_pool`` makes of
        them, [B, C]: the class token, the mean, or with "" all tokens.
        """
        pooled = {"token": lambda: x[:, 0], "avg": lambda: x.mean(1), "": lambda: x}[self.global_pool]()
        if pre_logits or self.num_classes == 0:
            return pooled
        return self.head(pooled) + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | tuple[Tensor, Tensor, Tensor]:
        if self.training and self.return_dense and self.classifiers:
            return self._forward_token_labels(x)
        return super().forward(x)

    def return_plain_logits(self) -> None:
        self.return_dense = self.mix_token = False

    def _forward_token_labels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._embed(x)
        grid = (x.shape[1] // DOWNSAMPLING, x.shape[2] // DOWNSAMPLING)
        box = random_box(*grid, x.device) if self.mix_token else x.new_zeros(4, dtype=torch.int64)
        x = self._forward_tokens(mix_box(x, box * DOWNSAMPLING), len(self.feature_info) - 1)[0]
        token_logits = mix_box(self.aux_head(x[:, 1:]).unflatten(1, grid), box).flatten(1, 2)  # back to their images
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


RELEASE = "https://github.com/sail-sg/volo/releases/download/volo_1"
# variant -> image side -> (file, share of the image's shorter side that the test crop takes)
WEIGHTS = {
    "d1": {224: ("d1_224_84.2", 0.96), 384: ("d1_384_85.2", 1.0)},
    "d2": {224: ("d2_224_85.2", 0.96), 384: ("d2_384_86.0", 1.0)},
    "d3": {224: ("d3_224_85.4", 0.96), 448: ("d3_448_86.3", 1.0)},
    "d4": {224: ("d4_224_85.7", 0.96), 448: ("d4_448_86.79", 1.15)},
    "d5": {224: ("d5_224_86.10", 0.96), 448: ("d5_448_87.0", 1.15), 512: ("d5_512_87.07", 1.15)},
}


def _config(size: str, img_size: tuple[int, int]) -> dict[str, Any]:
    """The weights trained at ``img_size``, or at 224 where there are none."""
    height, width = img_size
    side = height if height == width and height in WEIGHTS[size] else 224
    file, crop_pct = WEIGHTS[size][side]
    return pretrained_config(
        url=f"{RELEASE}/{file}.pth.tar",
        input_size=(3, height, width),
        crop_pct=crop_pct,
        first_conv="patch_embed.conv.0",
        classifier=("head", "aux_head"),
        fixed_input_size=True,
    )


VARIANTS: dict[str, tuple[Any, ...]] = {  # its options, and what is published of it
    "d1": ((4, 4, 8, 2), (192, 384), (6, 12), 3.0, 64, Published(26.6, 6.8, 84.2)),
    "d2": ((6, 4, 10, 4), (256, 512), (8, 16), 3.0, 64, Published(58.7, None, 85.2)),
    "d3": ((8, 8, 16, 4), (256, 512), (8, 16), 3.0, 64, Published(86.3, None, 85.4)),
    "d4": ((8, 8, 16, 4), (384, 768), (12, 16), 3.0, 64, Published(193, None, 85.7)),
    "d5": ((12, 12, 20, 4), (384, 768), (12, 16), 4.0, 128, Published(295.5, None, 86.1)),
}


def _variant(size: str) -> Callable[..., VOLO]:
    def config_of(model: VOLO) -> dict[str, Any]:
        return _config(size, model.img_size)

    *values, published = VARIANTS[size]
    options: dict[str, Any] = {}
    options.update(zip(("layers", "embed_dims", "num_heads", "mlp_ratio", "stem_dim"), values, strict=True))
    config = _config(size, (224, 224))
    return variant(VOLO, f"volo_{size}", f"VOLO-{size.upper()}", options, config, config_of, published)


volo_d1, volo_d2, volo_d3, volo_d4, volo_d5 = map(_variant, VARIANTS)
