"""Transformer blocks on tokens, class attention, position embeddings, and the mixing of mix-token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.basic import DropPath
from models.layers.fusion import as_built
from models.layers.outlook import check_heads
from models.layers.pointwise import activated, in_16_bits_on_gpu


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
        return self.proj(attend(query, key, value))


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
        return self.proj(attend(query, key, value))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q·kᵀ / √d)·v, [B, heads, N, d] each, with the heads side by side: [B, N, C]."""
    if torch.autograd.forward_ad._current_level < 0:
        out = F.scaled_dot_product_attention(query, key, value)
    else:  # PyTorch's fused attention has no forward-mode derivative
        out = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value
    return out.transpose(1, 2).flatten(2)


def _split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[B, N, parts·C] -> ``parts`` views [B, heads, N, C / heads]."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """W₂·GELU(W₁·x) over the last dimension.

    With ``inference``, GELU is a part of the first product in bfloat16 on a GPU, by the formula with tanh. Its error is
    an eighth of bfloat16's rounding: 2e-4 of GELU's norm for normally distributed numbers.
    """

    inference = False

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        eligible = self.inference and in_16_bits_on_gpu(x) and x.dtype != torch.float16
        if eligible and as_built(self.fc1, nn.Linear, x.device):
            hidden = activated(x.flatten(0, -2), self.fc1.weight, self.fc1.bias, gelu=True)
            if hidden is not None:
                return hidden.unflatten(0, x.shape[:-1])
        return F.gelu(self.fc1(x))

    def folded(self) -> nn.Module:
        self.inference = True
        return self


class Block(nn.Module):
    """x + attn(LN(x)), then x + MLP(LN(x)): an Outlooker or a transformer block, depending on ``attn``."""

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
    """A ``Block`` that changes only the class token, which attends to all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.drop_path(self.attn(self.norm1(x)))
        token = token + self.drop_path(self.mlp(self.norm2(token)))
        return torch.cat((token, x[:, 1:]), 1)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, h, w, C] -> [1, *grid, C]: bicubic over pixel areas (``align_corners=False``), without antialiasing."""
    if embedding.shape[1:3] == grid:
        return embedding
    return F.interpolate(embedding.permute(0, 3, 1, 2), grid, mode="bicubic").permute(0, 2, 3, 1)


def random_box(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """CutMix's box (arXiv 1905.04899, section 3.1): centre uniform, sides √(1 − λ) of the map's, λ ~ Beta(1, 1).

    Clipped at the border, so it may be smaller or empty. int64 (top, left, bottom, right), half open.
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
    """Takes the tokens inside the box from the opposite batch entry: [B, H, W, C] -> [B, H, W, C].

    It is its own inverse. It uses a mask, not a slice, so that the box never leaves the device.
    """
    top, left, bottom, right = box.unbind()
    rows, columns = (torch.arange(length, device=x.device) for length in x.shape[1:3])
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return torch.where(inside[..., None], x.flip(0), x)
