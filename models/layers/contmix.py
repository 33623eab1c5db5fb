"""ContMix: OverLoCK's dynamic convolution as a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.checks import integer, odd
from models.layers.basic import to_channels_last
from models.layers.fusion import convolves, fold_after, last_convolution
from models.layers.pointwise import PointwiseConv2d
from models.layers.tracing import leaf


class ContMix(nn.Module):
    """Context-mixing dynamic convolution: each position's kernels come from its affinity to a pooled context.

    With Q = BN(W_q·f) and R = BN(W_k·pool₇ₓ₇(c)), split into G heads of d/(2G) channels, where d = ``channels``:

        affinity = (d/G)^−½ · Qᵀ·R            49 numbers per position and head
        logits   = P·affinity + b             25 + K² numbers
        out      = [Σ_k softmax(logits₅ + rpb1)[k] · x₁[nbr₅(k)],  Σ_k softmax(logits_K + rpb2)[k] · x₂[nbr_K(k)]]

    x₁ and x₂ are the two halves of x's channels; windows slide inward at the border (arXiv 2502.20087, section 3.3).
    Maps with a side below K are enlarged bilinearly beforehand and pooled back afterwards.

    Shapes: x [B, d, H, W], features [B, d + context_channels, H, W] -> [B, d, H, W], in channels-last memory. The
    context of OverLoCK is its overview of the whole image; a map can also be its own context::

        layer = ContMix(64, context_channels=64, kernel_size=13, num_heads=4)
        layer(x, torch.cat((x, x), 1))                        # [2, 64, 28, 28] for x of that shape

    Args:
        channels: d, a multiple of 2G.
        context_channels: channels of the context map c.
        kernel_size: K of the large kernel, odd.
        num_heads: G.

    Raises:
        ValueError: an option out of its range; in the forward pass, shapes that do not fit.
    """

    SMALL_KERNEL = 5
    CONTEXT_SIZE = 7

    def __init__(self, channels: int, context_channels: int, kernel_size: int, num_heads: int) -> None:
        super().__init__()
        channels, context_channels = integer("channels", channels), integer("context_channels", context_channels)
        kernel_size, num_heads = odd("kernel_size", kernel_size), integer("num_heads", num_heads)
        if channels % (2 * num_heads):
            raise ValueError(f"channels must be a multiple of 2·num_heads = {2 * num_heads}, got {channels}")
        self.channels = channels
        self.context_channels = context_channels
        self.num_heads = num_heads
        self.kernel_sizes = (self.SMALL_KERNEL, kernel_size)
        self.scale = (channels / num_heads) ** -0.5
        self.rpb1, self.rpb2 = (nn.Parameter(torch.zeros(num_heads, 2 * k - 1, 2 * k - 1)) for k in self.kernel_sizes)
        query, key = (PointwiseConv2d(c, channels // 2, bias=False) for c in (channels, context_channels))
        self.weight_query = nn.Sequential(query, nn.BatchNorm2d(channels // 2))
        pool = nn.AdaptiveAvgPool2d(self.CONTEXT_SIZE)
        self.weight_key = nn.Sequential(pool, key, nn.BatchNorm2d(channels // 2))
        self.weight_proj = nn.Conv2d(self.CONTEXT_SIZE**2, sum(k * k for k in self.kernel_sizes), 1)

    @leaf
    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Mixes x [B, d, H, W] by kernels computed from features, which are f and c concatenated -> [B, d, H, W]."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape [B, {self.channels}, H, W], got {list(x.shape)}")
        expected = [x.shape[0], self.channels + self.context_channels, x.shape[2], x.shape[3]]
        if list(features.shape) != expected:
            raise ValueError(f"features must have shape {expected} to go with x, got {list(features.shape)}")
        size = (x.shape[2], x.shape[3])
        enlarged = self.mixing_size(*size)
        if enlarged != size:
            x = F.interpolate(x, enlarged, mode="bilinear")
            features = F.interpolate(features, enlarged, mode="bilinear")
        query = self.weight_query(features[:, : self.channels]).unflatten(1, (self.num_heads, -1))
        key = self.weight_key(features[:, self.channels :])
        key = key if self.scale == 1 else key * self.scale
        key = key.unflatten(1, (self.num_heads, -1)).flatten(3)
        value = x.unflatten(1, (2, self.num_heads, -1))
        proj = self.weight_proj
        if convolves(proj, 1, x.device) and proj.bias is not None:
            weight, tables = proj.weight.flatten(1), (self.rpb1, self.rpb2)
            mixed = kernels.contmix2d(query, key, value, weight, proj.bias, tables, kernel_sizes=self.kernel_sizes)
        else:
            mixed = self._mix_in_steps(query, key, value)
        mixed = to_channels_last(mixed.flatten(1, 3))
        return mixed if enlarged == size else F.adaptive_avg_pool2d(mixed, size)

    def _mix_in_steps(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same with every logit in memory, by calling ``weight_proj``, which may have been replaced."""
        affinity = query.flatten(3).transpose(2, 3) @ key  # [B, G, H·W, 49]
        logits = self.weight_proj(affinity.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, G, H·W, 25 + K²]
        logits = logits.unflatten(2, query.shape[3:]).split([size**2 for size in self.kernel_sizes], -1)
        halves = zip(logits, value.movedim(3, -1).unbind(1), self.kernel_sizes, (self.rpb1, self.rpb2), strict=True)
        mixed = [kernels.na2d_softmax_av(weights, half, size, rpb=rpb) for weights, half, size, rpb in halves]
        return torch.stack(mixed, 1).movedim(-1, 3)

    def folded(self) -> nn.Module:
        """Folds the scale (d/G)^−½ into the key's convolution."""
        conv = last_convolution(self.weight_key)
        if conv is not None:
            scale = conv.weight.new_full((conv.out_channels,), self.scale)
            fold_after(conv, scale, torch.zeros_like(scale))
            self.scale = 1.0
        return self

    def mixing_size(self, height: int, width: int) -> tuple[int, int]:
        """The map's size while it is mixed: as it is, or enlarged until the large kernel just fits."""
        kernel_size, short = self.kernel_sizes[-1], min(height, width)
        if short >= kernel_size:
            return height, width
        # As in the official code, whose weights were trained so, the quotient is rounded first. A square map's side may
        # then become K − 1, hence the maximum.
        ratio = kernel_size / short
        return max(kernel_size, int(ratio * height)), max(kernel_size, int(ratio * width))
