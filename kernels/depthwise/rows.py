# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Maps copied into aligned rows and back, tile by tile, so that reads and writes are both contiguous.

*Rows* are channels first, [B, C, H, pitch]: every row begins at a multiple of 16 bytes and ends in zeros. PyTorch's own
copy between channels last and channels first reads, or writes, one element per 32-byte sector.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.dtypes import precision
from kernels.launch import ceil_divide, launch
from kernels.layout import empty_like_map
from kernels.views import view

BLOCK_PIXELS, BLOCK_CHANNELS = (1024, 64) if interpreting() else (64, 64)


@triton.jit
def _copy_kernel(
    rows_ptr,  # [B, C, H, pitch], contiguous
    features,  # [B, C, H, W]
    channels, height, width, vectors,
    TO_ROWS: tl.constexpr, VECTOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The pitch is ``vectors`` · VECTOR: multiplying here tells Triton how rows align."""
    pixel_blocks, channel_blocks = tl.cdiv(height * vectors * VECTOR, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS)
    i_pixel = tl.program_id(0) % pixel_blocks
    i_channel = tl.program_id(0) // pixel_blocks % channel_blocks
    i_batch = (tl.program_id(0) // pixel_blocks // channel_blocks).to(tl.int64)
    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    o_channel = i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[:, None]
    o_row, o_column = o_pixel // (vectors * VECTOR), o_pixel % (vectors * VECTOR)
    m_rows = (o_channel < channels) & (o_pixel < height * vectors * VECTOR)
    # [C, P]
    p_rows = rows_ptr + (i_batch * channels + o_channel) * (height * vectors).to(tl.int64) * VECTOR + o_pixel
    o_features = o_channel.to(OFFSET) * features.c + o_row.to(OFFSET) * features.h + o_column.to(OFFSET) * features.w
    p_features = features.ptr + i_batch * features.b + o_features
    if TO_ROWS:
        tl.store(p_rows, tl.load(p_features, mask=m_rows & (o_column < width), other=0), mask=m_rows)
    else:
        tl.store(p_features, tl.load(p_rows, mask=m_rows, other=0), mask=m_rows & (o_column < width))


def _copy(rows: Tensor, features: Tensor, to_rows: bool) -> None:
    batch, channels, height, width = features.shape
    pitch = rows.shape[3]
    vector = vector_of(rows)
    # One program per (block of pixels, block of channels, image).
    grid = (ceil_divide(height * pitch, BLOCK_PIXELS) * ceil_divide(channels, BLOCK_CHANNELS) * batch,)
    arguments = {
        "rows_ptr": rows,
        "features": view(features, "b c h w"),
        "channels": channels,
        "height": height,
        "width": width,
        "vectors": pitch // vector,
        "TO_ROWS": to_rows,
        "VECTOR": vector,
        "OFFSET": precision(features[None])["OFFSET"],
        "BLOCK_PIXELS": BLOCK_PIXELS,
        "BLOCK_CHANNELS": BLOCK_CHANNELS,
    }
    launch(_copy_kernel, grid, rows.device, arguments, num_warps=4, num_stages=1)


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
    _copy(rows, x, to_rows=True)
    return rows


def in_layout_of(x: Tensor, rows: Tensor) -> Tensor:
    """Rows in the shape and memory order of x: themselves, or a copy."""
    target = empty_like_map(x)
    if (target.shape, target.stride()) == (rows.shape, rows.stride()):
        return rows
    _copy(rows, target, to_rows=False)
    return target
