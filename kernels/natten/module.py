"""NATTEN 0.17's ``NeighborhoodAttention2D``: the same arguments, state-dict names and numbers."""

import torch
from torch import Tensor, nn

from kernels.checks import odd_pair
from kernels.natten.functional import Causal, na2d_av, na2d_qk, refuse
from kernels.windows import Pair


class NeighborhoodAttention2D(nn.Module):
    """proj(softmax(scale · query·key + rpb) · value) over every pixel's neighbourhood: [B, H, W, dim] -> the same.

    Entries of the state dict: qkv.weight, qkv.bias, proj.weight, proj.bias, and rpb [num_heads, 2Kh − 1, 2Kw − 1] with
    ``rel_pos_bias``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Pair,
        dilation: int | Pair = 1,
        is_causal: Causal = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        refuse(is_causal)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be at least 1 and divide dim ({dim}), got {num_heads}")
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.kernel_size, self.dilation = odd_pair("kernel_size", kernel_size), dilation
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        rows, columns = self.kernel_size
        table = torch.empty(num_heads, 2 * rows - 1, 2 * columns - 1)
        self.rpb = nn.Parameter(nn.init.trunc_normal_(table, std=0.02)) if rel_pos_bias else None
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must have shape [B, H, W, dim], got {list(x.shape)}")
        # [B, H, W, 3·dim] -> three of [B, heads, H, W, head_dim]
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        attn = na2d_qk(query * self.scale, key, self.kernel_size, self.dilation, rpb=self.rpb).softmax(-1)
        out = na2d_av(self.attn_drop(attn), value, self.kernel_size, self.dilation)
        return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)))
