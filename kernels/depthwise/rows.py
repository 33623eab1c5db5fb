"""Maps in aligned rows: channels first, [B, C, H, pitch], where every row begins at a multiple of 16 bytes and ends in
zeros."""

import torch
from torch import Tensor

from kernels.launch import ceil_divide
from kernels.layout import empty_like_layout
from kernels.reorder import copy_rows


def vector_of(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // x.element_size()


def are_rows(x: Tensor) -> bool:
    """Whether x [B, C, H, W] can be read as it is, in vectors of 16 bytes."""
    lengths = (*x.stride()[:3], x.shape[3], x.storage_offset())
    return x.stride(3) == 1 and all(length * x.element_size() % 16 == 0 for length in lengths)


def check_size(x: Tensor) -> None:
    """Kernels count the pixels of a channel and the tiles of all images in 32 bits."""
    batch, _, height, width = x.shape
    if max(height * (width + 16), batch * ceil_divide(height, 8) * ceil_divide(width, 8)) >= 2**31 - 2**12:
        raise ValueError(f"x must have fewer than 2^31 pixels a channel and tiles, got {list(x.shape)}")


def new_rows(x: Tensor) -> Tensor:
    """Uninitialised rows for a map like x."""
    pitch = ceil_divide(x.shape[3], vector_of(x)) * vector_of(x)
    return torch.empty((*x.shape[:3], pitch), dtype=x.dtype, device=x.device)


def rows_of(x: Tensor) -> Tensor:
    """x itself where it can be read as it is; otherwise its copy in rows."""
    if are_rows(x):
        return x
    rows = new_rows(x)
    copy_rows(rows, x, to_rows=True)
    return rows


def in_layout_of(x: Tensor, rows: Tensor) -> Tensor:
    """Rows in the shape and memory order of x: themselves, or a copy."""
    target = empty_like_layout(x)
    if (target.shape, target.stride()) == (rows.shape, rows.stride()):
        return rows
    copy_rows(rows, target, to_rows=False)
    return target
