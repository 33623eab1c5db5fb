"""The batch norms of depthwise branches: maps u [N, B, C, H, pitch] in rows, normed each by its statistics, and summed.

    statistics: mean u_n, var u_n          out = Σ_n γ_n · x̂_n + β,   x̂_n = (u_n − mean u_n) / √(var u_n + ε)
    dγ_n = Σ dout · x̂_n,  dβ = Σ dout      du_n = γ_n / √(var u_n + ε) · (dout − dβ / M − x̂_n · dγ_n / M)

over the M values of a channel. All kernels go over tiles of channels and pixels of rows, and read each map once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.depthwise.rows import vector_of
from kernels.dtypes import accumulator, accumulator_dtype, precision
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.sum_rows import sum_rows
from kernels.views import view

PROGRAMS = 2048  # that sum over images: enough for every processor of a large GPU


@triton.jit
def _tile(channels, height, vectors, VECTOR: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's channels [C, 1] and pixels of rows [1, P]; which channels there are, and which of both; the elements
    of a channel's rows; and what number the program has beside its tile."""
    pixel_blocks, channel_blocks = tl.cdiv(height * vectors * VECTOR, PIXELS), tl.cdiv(channels, BLOCK)
    i_pixel, i_channel = tl.program_id(0) % pixel_blocks, tl.program_id(0) // pixel_blocks % channel_blocks
    o_channel = i_channel * BLOCK + tl.arange(0, BLOCK)[:, None]
    o_pixel = i_pixel * PIXELS + tl.arange(0, PIXELS)[None, :]
    plane = tl.cast(height * vectors, tl.int64) * VECTOR
    m_channel = o_channel < channels
    i_rest = tl.program_id(0) // pixel_blocks // channel_blocks
    return o_channel, o_pixel, m_channel, m_channel & (o_pixel < plane), plane, i_rest


@triton.jit
def _near_mean(points, i_branch, o_channel, m_channel, ACCUMULATOR: tl.constexpr):
    """A value of every channel near its mean: the median of three points, so that it is none that is far from all
    others, about which a variance would be a small difference of large numbers."""
    p_channel = points.ptr + tl.cast(i_branch, tl.int64) * points.k + o_channel.to(tl.int64) * points.c
    b_first = tl.load(p_channel, mask=m_channel, other=0).to(ACCUMULATOR)
    b_second = tl.load(p_channel + points.w, mask=m_channel, other=0).to(ACCUMULATOR)
    b_third = tl.load(p_channel + 2 * tl.cast(points.w, tl.int64), mask=m_channel, other=0).to(ACCUMULATOR)
    b_larger = tl.maximum(b_first, b_second)
    return tl.maximum(tl.minimum(b_first, b_second), tl.minimum(b_larger, b_third))


@triton.jit
def _moments_kernel(
    u_ptr,  # [N, B, C, H, pitch], contiguous
    points,  # [N, C, 3]
    parts_ptr,  # [parts, N, 2, C], contiguous
    batch, channels, height, width, vectors, images,
    BRANCHES: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of some images and pixels Σ (u − centre) and Σ (u − centre)²: nothing cancels where a mean is large."""
    tile = _tile(channels, height, vectors, VECTOR, PIXELS, BLOCK)
    o_channel, o_pixel, m_channel, m_rows, plane, i_rest = tile
    i_branch, i_chunk = i_rest % BRANCHES, i_rest // BRANCHES
    first, last = i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)
    p_u = u_ptr + ((tl.cast(i_branch, tl.int64) * batch + first) * channels + o_channel) * plane + o_pixel
    b_centre = _near_mean(points, i_branch, o_channel, m_channel, ACCUMULATOR)
    # [C, P]
    b_sum = tl.zeros([BLOCK, PIXELS], ACCUMULATOR)
    b_squares = tl.zeros([BLOCK, PIXELS], ACCUMULATOR)
    for _ in range(first, last):
        b_away = tl.load(p_u, mask=m_rows, other=0).to(ACCUMULATOR) - b_centre
        b_sum += b_away
        b_squares += b_away * b_away
        p_u += channels * plane
    # [C, 1]
    m_map = m_rows & (o_pixel % (vectors * VECTOR) < width)
    b_sum = tl.sum(tl.where(m_map, b_sum, 0.0), axis=1, keep_dims=True)
    b_squares = tl.sum(tl.where(m_map, b_squares, 0.0), axis=1, keep_dims=True)
    pixel_blocks = tl.cdiv(height * vectors * VECTOR, PIXELS)
    i_part = (i_chunk * pixel_blocks + tl.program_id(0) % pixel_blocks) * BRANCHES + i_branch
    p_parts = parts_ptr + i_part.to(tl.int64) * (2 * channels) + o_channel
    tl.store(p_parts, b_sum, mask=m_channel)
    tl.store(p_parts + channels, b_squares, mask=m_channel)


@triton.jit
def _statistics_kernel(
    points,  # [N, C, 3]
    parts_ptr,  # [parts, N, 2, C], contiguous: Σ (u − centre), Σ (u − centre)²
    statistics_ptr,  # [2, N, C], contiguous: mean and biased variance
    parts, channels, values,
    BRANCHES: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    i_branch = tl.program_id(0) % BRANCHES
    o_channel = tl.program_id(0) // BRANCHES * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    o_part = tl.arange(0, BLOCK_PARTS)[:, None]
    # [P, C]
    b_sum = tl.zeros([BLOCK_PARTS, BLOCK], ACCUMULATOR)
    b_squares = tl.zeros([BLOCK_PARTS, BLOCK], ACCUMULATOR)
    for i_part in range(0, parts, BLOCK_PARTS):
        o_sums = ((i_part + o_part).to(tl.int64) * BRANCHES + i_branch) * (2 * channels) + o_channel[None, :]
        m_part = m_channel[None, :] & (i_part + o_part < parts)
        b_sum += tl.load(parts_ptr + o_sums, mask=m_part, other=0)
        b_squares += tl.load(parts_ptr + channels + o_sums, mask=m_part, other=0)
    # [C]
    b_away = tl.sum(b_sum, axis=0) / values
    b_variance = tl.maximum(tl.sum(b_squares, axis=0) / values - b_away * b_away, 0, tl.PropagateNan.ALL)
    b_centre = _near_mean(points, i_branch, o_channel, m_channel, ACCUMULATOR)
    p_statistics = statistics_ptr + i_branch * channels + o_channel
    tl.store(p_statistics, b_centre + b_away, mask=m_channel)
    tl.store(p_statistics + BRANCHES * channels, b_variance, mask=m_channel)


@triton.jit
def _norm(statistics_ptr, o_norm, m_channel, norms, epsilon):
    """Mean and 1 / √(variance + ε) of a branch, [C, 1]."""
    b_variance = tl.load(statistics_ptr + norms + o_norm, mask=m_channel, other=1)
    return tl.load(statistics_ptr + o_norm, mask=m_channel, other=0), tl.rsqrt(b_variance + epsilon)


@triton.jit
def _sum_kernel(
    u_ptr,  # [N, B, C, H, pitch], contiguous
    statistics_ptr,  # [2, N, C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [C]
    out,  # [B, C, H, W]
    batch, channels, height, width, vectors, epsilon,
    BRANCHES: tl.constexpr, VECTOR: tl.constexpr, OFFSET: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = Σ_n γ_n · x̂_n + β, by tiles: rows are read along pixels, out is written along channels."""
    tile = _tile(channels, height, vectors, VECTOR, PIXELS, BLOCK)
    o_channel, o_pixel, m_channel, m_rows, plane, i_batch = tile
    o_rows = (i_batch.to(tl.int64) * channels + o_channel) * plane + o_pixel
    # [C, P]
    b_sum = tl.load(shift_ptr + o_channel, mask=m_channel, other=0) + tl.zeros([BLOCK, PIXELS], ACCUMULATOR)
    for n in tl.static_range(BRANCHES):
        o_norm = n * channels + o_channel
        b_mean, b_rsqrt = _norm(statistics_ptr, o_norm, m_channel, BRANCHES * channels, epsilon)
        b_scale = tl.load(scale_ptr + o_norm, mask=m_channel, other=0)
        b_u = tl.load(u_ptr + n * batch * channels * plane + o_rows, mask=m_rows, other=0)
        b_sum += (b_u.to(ACCUMULATOR) - b_mean) * (b_rsqrt * b_scale)
    o_row, o_column = o_pixel // (vectors * VECTOR), o_pixel % (vectors * VECTOR)
    o_out = o_channel.to(OFFSET) * out.c + o_row.to(OFFSET) * out.h + o_column.to(OFFSET) * out.w
    tl.store(out.ptr + i_batch.to(tl.int64) * out.b + o_out, b_sum.to(out.ptr.dtype.element_ty),
             mask=m_rows & (o_column < width))  # fmt: skip


@triton.jit
def _reduction_kernel(
    rows_ptr,  # [B, C, H, pitch], contiguous: grad in rows, 0 beside the map
    u_ptr,  # [N, B, C, H, pitch], contiguous
    statistics_ptr,  # [2, N, C]
    parts_ptr,  # [parts, N + 1, C], contiguous
    batch, channels, height, width, vectors, epsilon, images,
    BRANCHES: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of some images and pixels: Σ grad · x̂_n for every branch, then Σ grad."""
    tile = _tile(channels, height, vectors, VECTOR, PIXELS, BLOCK)
    o_channel, o_pixel, m_channel, m_rows, plane, i_chunk = tile
    m_map = o_pixel % (vectors * VECTOR) < width
    means = ()
    for n in tl.static_range(BRANCHES):
        means = means + (tl.load(statistics_ptr + n * channels + o_channel, mask=m_channel, other=0),)
    sums = (tl.zeros([BLOCK, 1], ACCUMULATOR),) * (BRANCHES + 1)
    for i_image in range(i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)):
        o_rows = (tl.cast(i_image, tl.int64) * channels + o_channel) * plane + o_pixel
        # [C, P]
        b_grad = tl.load(rows_ptr + o_rows, mask=m_rows, other=0).to(ACCUMULATOR)
        for n in tl.static_range(BRANCHES):
            b_u = tl.load(u_ptr + n * batch * channels * plane + o_rows, mask=m_rows, other=0).to(ACCUMULATOR)
            b_away = tl.where(m_map, b_u - means[n], 0.0)
            b_part = sums[n] + tl.sum(b_grad * b_away, axis=1, keep_dims=True)
            sums = sums[:n] + (b_part,) + sums[n + 1 :]
        sums = sums[:BRANCHES] + (sums[BRANCHES] + tl.sum(b_grad, axis=1, keep_dims=True),)
    pixel_blocks = tl.cdiv(height * vectors * VECTOR, PIXELS)
    i_part = i_chunk * pixel_blocks + tl.program_id(0) % pixel_blocks
    p_parts = parts_ptr + i_part.to(tl.int64) * (BRANCHES + 1) * channels + o_channel
    for n in tl.static_range(BRANCHES):
        o_norm = n * channels + o_channel
        _mean, b_rsqrt = _norm(statistics_ptr, o_norm, m_channel, BRANCHES * channels, epsilon)
        tl.store(p_parts + n * channels, sums[n] * b_rsqrt, mask=m_channel)
    tl.store(p_parts + BRANCHES * channels, sums[BRANCHES], mask=m_channel)


@triton.jit
def _gradients_kernel(
    rows_ptr,  # [B, C, H, pitch], contiguous: grad in rows
    u_ptr,  # [N, B, C, H, pitch], contiguous
    statistics_ptr,  # [2, N, C]
    scale_ptr,  # [N, C]
    sums_ptr,  # [N + 1, C]: dγ, dβ
    grads_ptr,  # like u: becomes du
    batch, channels, height, width, vectors, epsilon,
    BRANCHES: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """du_n, 0 where rows are longer than the map is wide."""
    tile = _tile(channels, height, vectors, VECTOR, PIXELS, BLOCK)
    o_channel, o_pixel, m_channel, m_rows, plane, i_batch = tile
    m_map = o_pixel % (vectors * VECTOR) < width
    o_rows = (i_batch.to(tl.int64) * channels + o_channel) * plane + o_pixel
    b_grad = tl.load(rows_ptr + o_rows, mask=m_rows, other=0).to(ACCUMULATOR)
    number = tl.cast(tl.cast(batch, tl.int64) * height * width, ACCUMULATOR)
    b_mean_grad = tl.load(sums_ptr + BRANCHES * channels + o_channel, mask=m_channel, other=0) / number
    for n in tl.static_range(BRANCHES):
        o_norm = n * channels + o_channel
        b_mean, b_rsqrt = _norm(statistics_ptr, o_norm, m_channel, BRANCHES * channels, epsilon)
        b_scale = tl.load(scale_ptr + o_norm, mask=m_channel, other=0)
        b_slope = tl.load(sums_ptr + o_norm, mask=m_channel, other=0) / number * b_rsqrt
        o_branch = n * batch * channels * plane + o_rows
        b_u = tl.load(u_ptr + o_branch, mask=m_rows, other=0).to(ACCUMULATOR)
        b_grad_u = (b_grad - b_mean_grad - (b_u - b_mean) * b_slope) * (b_scale * b_rsqrt)
        tl.store(grads_ptr + o_branch, tl.where(m_map, b_grad_u, 0.0).to(grads_ptr.dtype.element_ty), mask=m_rows)


def _tiled(x: Tensor, pitch: int, branches: int) -> tuple[int, dict[str, Any]]:
    """Tiles of an image, and what the kernels that go over tiles of rows share."""
    channels, height, width = x.shape[1:]
    block = min(1024 if interpreting() else 32, next_power_of_2(channels))
    # The interpreter takes blocks of up to 2^20 numbers.
    pixels = min(2**20 // max(64, block) if interpreting() else 64, next_power_of_2(height * pitch))
    arguments = {
        "batch": x.shape[0], "channels": channels, "height": height, "width": width, "vectors": pitch // vector_of(x),
        "BRANCHES": branches, "VECTOR": vector_of(x), "ACCUMULATOR": accumulator(x.dtype),
        "PIXELS": pixels, "BLOCK": block,
    }  # fmt: skip
    return ceil_divide(height * pitch, pixels) * ceil_divide(channels, block), arguments


def _chunks(x: Tensor, programs: int, pitch: int, pixels: int) -> tuple[int, int, int]:
    """How many images a program sums, how many such chunks there are, and how many parts of a channel's sum."""
    images = x.shape[0] if interpreting() else max(1, x.shape[0] * programs // PROGRAMS)
    chunks = ceil_divide(x.shape[0], images)
    return images, chunks, chunks * ceil_divide(x.shape[2] * pitch, pixels)


def statistics_of(x: Tensor, u: Tensor) -> Tensor:
    """Mean and biased variance of every branch of a map x, [2, N, C]."""
    branches, channels, dtype = u.shape[0], x.shape[1], accumulator_dtype(x.dtype)
    tiles, common = _tiled(x, u.shape[-1], branches)
    images, chunks, parts = _chunks(x, tiles * branches, u.shape[-1], common["PIXELS"])
    # Three points of every channel: a quarter, half and three quarters of the way down and across, in the first image,
    # one in the middle and the last.
    branch, image, channel, row, _ = u.stride()
    down, across = x.shape[2] // 4, x.shape[3] // 4
    first, step = down * row + across, (x.shape[0] - 1) // 2 * image + down * row + across
    points = view(u.as_strided((branches, channels, 3), (branch, channel, step), first), "k c w")
    partial = torch.empty((parts, branches, 2, channels), dtype=dtype, device=x.device)
    arguments = {"u_ptr": u, "points": points, "parts_ptr": partial, "images": images, **common}
    # One program per (block of pixels, block of channels, branch, chunk of images).
    launch(_moments_kernel, (tiles * branches * chunks,), x.device, arguments, num_warps=4, num_stages=1)
    statistics = torch.empty((2, branches, channels), dtype=dtype, device=x.device)
    block = 1024 if interpreting() else 16
    arguments = {
        "points": points, "parts_ptr": partial, "statistics_ptr": statistics, "parts": parts, "channels": channels,
        "values": x.numel() // channels, "BRANCHES": branches, "BLOCK_PARTS": 128, "BLOCK": block,
        "ACCUMULATOR": accumulator(x.dtype),
    }  # fmt: skip
    # One program per (branch, block of channels).
    grid = (branches * ceil_divide(channels, block),)
    launch(_statistics_kernel, grid, x.device, arguments, num_warps=4, num_stages=1)
    return statistics


def normed_sum(x: Tensor, u: Tensor, statistics: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """out, like x."""
    out = empty_like_layout(x)
    tiles, common = _tiled(x, u.shape[-1], u.shape[0])
    arguments = {"u_ptr": u, "statistics_ptr": statistics, "scale_ptr": scale, "shift_ptr": shift, "epsilon": epsilon}
    arguments |= {"out": view(out, "b c h w"), "OFFSET": precision(out[None])["OFFSET"], **common}
    # One program per (block of pixels, block of channels, image).
    launch(_sum_kernel, (tiles * x.shape[0],), x.device, arguments, num_warps=4, num_stages=1)
    return out


def norm_gradients(
    x: Tensor, grad_rows: Tensor, u: Tensor, statistics: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """du, like u; and dγ of every branch and, last, dβ, [N + 1, C]."""
    branches, channels, dtype = u.shape[0], x.shape[1], accumulator_dtype(x.dtype)
    tiles, common = _tiled(x, u.shape[-1], branches)
    images, chunks, parts = _chunks(x, tiles, u.shape[-1], common["PIXELS"])
    partial = torch.empty((parts, (branches + 1) * channels), dtype=dtype, device=x.device)
    common |= {"u_ptr": u, "statistics_ptr": statistics, "rows_ptr": grad_rows, "epsilon": epsilon}
    arguments = {"parts_ptr": partial, "images": images, **common}
    # One program per (block of pixels, block of channels, chunk of images).
    launch(_reduction_kernel, (tiles * chunks,), x.device, arguments, num_warps=4, num_stages=1)
    sums, grads = sum_rows(sum_rows(partial, 64, dtype), 1, dtype), torch.empty_like(u)
    arguments = {"sums_ptr": sums, "grads_ptr": grads, "scale_ptr": scale, **common}
    # One program per (block of pixels, block of channels, image).
    launch(_gradients_kernel, (tiles * x.shape[0],), x.device, arguments, num_warps=4, num_stages=1)
    return grads, sums.view(branches + 1, channels)
