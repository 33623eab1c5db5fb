"""Neighbourhood operators under the names and signatures that NATTEN had up to 0.17: a model changes one import line.

    from kernels.natten.functional import na2d_av, na2d_qk        # instead of: from natten.functional import ...

They run wherever ``kernels`` runs, on a CPU too, and cast what NATTEN casts: ``attn`` to value's dtype, the bias to
query's. Causal masks and additional keys or values are refused: none of the models this repository knows use them in
two dimensions.
"""

import re
from operator import mul

from torch import Tensor

import kernels
from kernels.checks import as_pair, check_tensors
from kernels.natten.context import *  # noqa: F403  (NATTEN has them here, too)
from kernels.windows import Pair

NAMES = ("na2d_av", "na2d_qk", "na2d_qk_with_bias", "natten2dav", "natten2dqk", "natten2dqkrpb")
Causal = bool | tuple[bool, bool] | None


def refuse_other_ranks(name: str) -> object:
    """A module's ``__getattr__``: NATTEN's names for one and three dimensions get an error that says what exists."""
    if re.search(r"(na|natten|attention)[13]d", name.lower()):
        # Not AttributeError, whose message an import statement replaces by its own.
        raise ImportError(f"{name} does not exist here: kernels.natten has the two-dimensional {', '.join(NAMES)} only")
    raise AttributeError(f"module 'kernels.natten' has no attribute {name!r}")


__getattr__ = refuse_other_ranks


def refuse(is_causal: Causal, **additional: Tensor | None) -> None:
    """ValueError for what NATTEN offers and this package does not."""
    for name, tensor in additional.items():
        if tensor is not None:
            raise ValueError(f"{name} must be None: attention to tokens outside the map is not supported")
    if any(is_causal) if isinstance(is_causal, (tuple, list)) else is_causal:
        raise ValueError(f"is_causal must be False on both axes: causal windows are not supported, got {is_causal!r}")


def _refuse_heads_last(
    name: str, tensor: Tensor, kernel_size: int | Pair, dilation: int | Pair, rpb: Tensor | None = None
) -> None:
    """ValueError for [B, H, W, heads, D] where the window, or the bias, fits that reading of the sizes alone."""
    check_tensors(**{name: tensor})
    if tensor.dim() != 5:
        return
    rows, columns = map(mul, as_pair("kernel_size", kernel_size, 1), as_pair("dilation", dilation, 1))

    def fits(heads: int, height: int, width: int) -> bool:
        return rows <= height and columns <= width and (rpb is None or rpb.shape[0] == heads)

    _, first, second, third, _ = tensor.shape
    if fits(third, first, second) and not fits(first, second, third):
        raise ValueError(
            f"{name} must be heads first, [B, heads, H, W, D]; {list(tensor.shape)} fits as heads-last "
            "[B, H, W, heads, D] only: permute(0, 3, 1, 2, 4) it"
        )


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """``kernels.na2d_qk``: query, key [B, heads, H, W, D] -> [B, heads, H, W, K²]; rpb [heads, 2Kh − 1, 2Kw − 1]."""
    refuse(is_causal, additional_keys=additional_keys)
    _refuse_heads_last("query", query, kernel_size, dilation, rpb)
    return kernels.na2d_qk(query, key, kernel_size, dilation, None if rpb is None else rpb.to(query.dtype))


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal = False,
) -> Tensor:
    """``kernels.na2d_av``: attn [B, heads, H, W, K²], value [B, heads, H, W, D] -> [B, heads, H, W, D]."""
    refuse(is_causal, additional_values=additional_values)
    check_tensors(attn=attn)
    _refuse_heads_last("value", value, kernel_size, dilation)
    return kernels.na2d_av(attn.to(value.dtype), value, kernel_size, dilation)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal = False,
) -> Tensor:
    """``na2d_qk`` with the bias third, as NATTEN 0.15 has it."""
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, is_causal, bias)


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int | Pair, dilation: int | Pair = 1
) -> Tensor:
    """``na2d_qk`` with a relative position bias under its name up to NATTEN 0.14."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


natten2dqk, natten2dav = na2d_qk, na2d_av  # under their names up to NATTEN 0.14
