"""The unfused neighbourhood operators under NATTEN 0.17's signatures, so that a model runs by changing one import line:

    from kernels.natten.functional import na2d_av, na2d_qk        # instead of: from natten.functional import ...

They run wherever ``kernels`` runs, on a CPU too. Causal masks and additional keys or values are refused: none of the
models this repository knows use them in two dimensions.
"""

from __future__ import annotations

from torch import Tensor

import kernels
from kernels.windows import Pair

__all__ = ["na2d_av", "na2d_qk"]


def _refuse(additional: tuple[str, Tensor | None], is_causal: bool | tuple[bool, ...] | None) -> None:
    name, tensor = additional
    if tensor is not None:
        raise ValueError(f"{name} must be None: attention to tokens outside the map is not supported")
    causal = any(is_causal) if isinstance(is_causal, (tuple, list)) else bool(is_causal)
    if causal:
        raise ValueError(f"is_causal must be False on both axes: causal windows are not supported, got {is_causal!r}")


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | tuple[bool, bool] | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """``kernels.na2d_qk``: query, key [B, heads, H, W, D] -> [B, heads, H, W, K²]; rpb [heads, 2Kh − 1, 2Kw − 1]."""
    _refuse(("additional_keys", additional_keys), is_causal)
    return kernels.na2d_qk(query, key, kernel_size, dilation, rpb)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | tuple[bool, bool] | None = False,
) -> Tensor:
    """``kernels.na2d_av``: attn [B, heads, H, W, K²], value [B, heads, H, W, D] -> [B, heads, H, W, D]."""
    _refuse(("additional_values", additional_values), is_causal)
    return kernels.na2d_av(attn, value, kernel_size, dilation)
