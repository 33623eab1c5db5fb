"""VOLO's outlook attention as a layer."""

import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.checks import integer, odd
from models.layers.tracing import leaf


def check_heads(dim: int, num_heads: int) -> None:
    """TypeError or ValueError unless ``num_heads`` divides ``dim``."""
    if integer("dim", dim) % integer("num_heads", num_heads):
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")


class OutlookAttention(nn.Module):
    """Mixes every window of K×K tokens by attention, which a linear map computes from the token at its centre.

        logits[i]  = A·pool(x)[i] + a                                       heads × K² targets × K² sources for window i
        out[j]     = P·(Σ_{i, t: j is target t of window i} Σ_s softmax_s(logits[i] / √d)[t, s] · (V·x)[nbr(i, s)]) + p

    with ``pool`` the mean over stride × stride tokens (at the border: over those that exist), d = C / heads, and zero
    padding of K // 2 whose positions keep their share of the softmax  (arXiv 2106.13112, eq. 3 to 5).

    Shapes: x [B, H, W, C] -> [B, H, W, C], with ceil(H / stride) × ceil(W / stride) windows. A feature map
    [B, C, H, W] goes in and out permuted, without a copy where its memory is channels-last::

        layer = OutlookAttention(64, num_heads=4)
        layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)      # [2, 64, 28, 28] for x of that shape

    Args:
        dim: C.
        num_heads: divides C.
        kernel_size: K, odd.
        stride: tokens between windows, 1..K.

    Raises:
        ValueError: an option out of its range; in the forward pass, an x that is not [B, H, W, C].
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 3, stride: int = 2) -> None:
        kernel_size, stride = odd("kernel_size", kernel_size), integer("stride", stride)
        if stride > kernel_size:
            raise ValueError(f"stride must lie in 1..kernel_size = {kernel_size} to reach every token, got {stride}")
        check_heads(dim, num_heads)
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.stride = stride
        self.scale = (dim // num_heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=False)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"x must have shape [B, H, W, {self.dim}], got {list(x.shape)}")
        # Inductor takes the second of four axes for the channels: a tensor that is used twice, with a convolution after
        # it somewhere, is stored as a channels-last map of them and copied back. Of three axes, it stays as it is.
        tokens, size = x.flatten(1, 2), x.shape[1:3]
        # The permuted view is channels-last memory, which pooling reads and writes as it is.
        maps = tokens.unflatten(1, size).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(maps, self.stride, ceil_mode=True).permute(0, 2, 3, 1)
        logits = self.attn(pooled).unflatten(-1, (self.num_heads, self.kernel_size**2, self.kernel_size**2))
        value = self.v(tokens).unflatten(1, size)
        window = {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.kernel_size // 2}
        return self.proj(kernels.outlook_attention2d(logits, value, scale=self.scale, **window))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}"
