"""ContMix: every pixel mixes its neighbourhood with kernels generated from its affinity to the whole image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import get_backend
from kernels.checks import check_shape, check_tensors, check_window_fits, odd_pair
from kernels.neighborhood.op import kernel_first, softmax_aggregate
from kernels.windows import Window

__all__ = ["contmix2d"]


def contmix2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rpb: Sequence[Tensor],
    *,
    kernel_sizes: Sequence[int],
) -> Tensor:
    """affinity[n,l] = Σ_c query[c,n] · key[c,l];  logits[n,:] = proj_weight @ affinity[n,:] + proj_bias, split by kernel size;
    out[m,:,n] = Σ_k softmax_k(logits_m[n,:] + rpb_m)[k] · value[m,:,nbr_m(n,k)]   for every batch entry and group

    Both steps before the softmax are linear, so they are taken in the other order: keys projected once,
    projected[c,k] = Σ_l key[c,l] · proj_weight[k,l], then logits[n,k] = Σ_c query[c,n] · projected[c,k] + proj_bias[k].
    That needs no affinity tensor and Dq instead of Dq·L/ΣK² + L multiply-adds per logit (16 instead of 53 in OverLoCK).

    Args:
        query: [B, G, Dq, H, W]; no scale is applied.
        key: [B, G, Dq, L], the context: OverLoCK pools it to 7x7, so L = 49.
        value: [B, M, G, Dv, H, W], one set of channels per kernel size.
        proj_weight: [ΣK_m², L], rows of the first kernel size first; shared by all groups.
        proj_bias: [ΣK_m²].
        rpb: M relative position biases [G, 2K_m − 1, 2K_m − 1].
        kernel_sizes: M odd window sizes, none larger than the map.

    Returns:
        [B, M, G, Dv, H, W]. Differentiable once, in every tensor argument.

    Raises:
        TypeError: an argument is no floating tensor, the dtypes differ, or rpb or kernel_sizes is no sequence.
        ValueError: shapes, devices or sizes do not fit together.

    Source: arXiv 2502.20087, equations 1-3.
    """
    if not isinstance(kernel_sizes, (tuple, list)) or not kernel_sizes:
        raise TypeError(f"kernel_sizes must be a non-empty sequence of odd ints, got {kernel_sizes!r}")
    if not isinstance(rpb, (tuple, list)):
        raise TypeError(f"rpb must be a sequence of {len(kernel_sizes)} tensors, got {type(rpb).__name__}")
    if len(rpb) != len(kernel_sizes):
        raise ValueError(f"rpb must hold one tensor per kernel size ({len(kernel_sizes)}), got {len(rpb)}")
    sizes = [odd_pair(f"kernel_sizes[{m}]", size)[0] for m, size in enumerate(kernel_sizes)]
    tables = {f"rpb[{m}]": table for m, table in enumerate(rpb)}
    query, key, value, proj_weight, proj_bias, *biases = check_tensors(
        query=query, key=key, value=value, proj_weight=proj_weight, proj_bias=proj_bias, **tables
    )
    check_shape("query", query, "B G Dq H W")
    batch, groups, query_channels, height, width = query.shape
    check_shape("key", key, "B G Dq L", B=batch, G=groups, Dq=query_channels)
    check_shape("value", value, "B M G Dv H W", B=batch, M=len(sizes), G=groups, H=height, W=width)
    positions = sum(size**2 for size in sizes)
    check_shape("proj_weight", proj_weight, "ΣK² L", **{"ΣK²": positions, "L": key.shape[3]})
    check_shape("proj_bias", proj_bias, "ΣK²", **{"ΣK²": positions})
    for (name, table), size in zip(tables.items(), sizes, strict=True):
        check_shape(name, table, "G 2K-1 2K-1", **{"G": groups, "2K-1": 2 * size - 1})
        check_window_fits((size, size), (1, 1), height, width)
    backend = get_backend()
    if backend == "reference":
        return reference.contmix2d(query, key, value, proj_weight, proj_bias, biases, kernel_sizes=tuple(sizes))

    # [B·G, N, Dq] @ [B·G, Dq, ΣK²] + [ΣK²], the bias added inside the product.
    projected = key @ proj_weight.t()
    pixels = query.flatten(3).transpose(2, 3)
    logits = torch.baddbmm(proj_bias, pixels.flatten(0, 1), projected.flatten(0, 1))
    logits = logits.view(batch, groups, height, width, positions).split([size**2 for size in sizes], -1)
    mixed = [
        softmax_aggregate(
            kernel_first(logits[m], (size, size)), value[:, m], biases[m], Window.neighborhood((size, size)), backend
        )
        for m, size in enumerate(sizes)
    ]
    return torch.stack(mixed, 1)
