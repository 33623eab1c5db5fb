"""Depthwise convolution of small channels-last maps: a thread has a channel's map and kernel in its registers.

    out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − K//2 + k] (+ bias[c])
    gradient[c,k] = Σ_{b,i} grad[b,c,i] · x[b,c, i − K//2 + k]

The code is written out for the sizes of map and kernel, so that it holds no product with what lies beside the map: of
7×7 products for each of 7×7 pixels 57 % remain. ``forward`` would copy such a map into rows, spread the kernel to a
band, and copy back. A value that is not finite reaches what it reaches in the definition.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import channels_fastest, empty_like_layout
from kernels.registers import stack, unstack
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated

REGISTERS = 215  # for two maps and a kernel, which the gradient of a weight has; of 255, others are for addresses
LARGEST_KERNEL = 11
PROGRAMS = 1024  # of the weight gradient: two warps on each scheduler of a large GPU


@triton.jit
def _add_products(b_sum, left, right):
    """b_sum + Σ_i left[i] · right[i]"""
    for i in tl.static_range(len(left)):
        b_sum += left[i] * right[i]
    return b_sum


@triton.jit
def _add_overlap(b_sum, left, right, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """b_sum + Σ_ij left[i][j] · right[i + DOWN][j + ACROSS], wherever there are both."""
    FIRST: tl.constexpr = max(0, -ACROSS)
    LAST: tl.constexpr = max(FIRST, min(len(left[0]), len(right[0]) - ACROSS))
    for i in tl.static_range(max(0, -DOWN), min(len(left), len(right) - DOWN)):
        b_sum = _add_products(b_sum, left[i][FIRST:LAST], right[i + DOWN][FIRST + ACROSS : LAST + ACROSS])
    return b_sum


@triton.jit
def _in_rows(entries, WIDTH: tl.constexpr):
    rows = ()
    for i in tl.static_range(len(entries) // WIDTH):
        rows = rows + (entries[i * WIDTH : (i + 1) * WIDTH],)
    return rows


@triton.jit
def _block_of(entries):
    """Entries [C, 1] as a block [C, P], P the next power of two."""
    return stack(entries + (entries[0],) * (triton.next_power_of_2(len(entries)) - len(entries)))


@triton.jit
def _channels(CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's channels [C, 1], which of them there are, and what number the program has beside them.

    A thread is to have one channel, then nothing is exchanged: so Triton is told that no more of them are aligned.
    """
    BLOCKS: tl.constexpr = triton.cdiv(CHANNELS, BLOCK)
    o_channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)[:, None]
    m_channel = (o_channel < CHANNELS) | (CHANNELS % BLOCK == 0)
    return tl.multiple_of(o_channel, [1, 1]), m_channel, tl.program_id(0) // BLOCKS


@triton.jit
def _map(i_image, o_channel, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets of an image's pixels, [C, P], and which of them there are."""
    o_pixel = tl.arange(0, triton.next_power_of_2(PIXELS))[None, :]
    return tl.cast(i_image, tl.int64) * (PIXELS * CHANNELS) + o_channel + o_pixel * CHANNELS, o_pixel < PIXELS


@triton.jit
def _load(maps, i_image, o_channel, m_channel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """An image's rows of pixels [C, 1]."""
    o_map, m_map = _map(i_image, o_channel, HEIGHT * WIDTH, CHANNELS)
    b_map = tl.load(maps + o_map, mask=m_channel & m_map, other=0)
    return _in_rows(unstack(b_map.to(tl.float32))[: HEIGHT * WIDTH], WIDTH)


@triton.jit
def _small_map_kernel(
    x,  # [B, H, W, C], contiguous
    weight,  # [C, K, K], contiguous
    bias,  # [C], not read without HAS_BIAS
    out,  # like x
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr,
    FLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (image, block of channels), channels fastest.
    TAPS: tl.constexpr = KERNEL * KERNEL
    o_channel, m_channel, i_image = _channels(CHANNELS, BLOCK)
    o_tap = tl.arange(0, triton.next_power_of_2(TAPS))[None, :]
    b_weight = tl.load(weight + o_channel * TAPS + o_tap, mask=m_channel & (o_tap < TAPS), other=0)
    entries = unstack(b_weight.to(tl.float32))[:TAPS]
    weights = _in_rows(entries[::-1] if FLIPPED else entries, KERNEL)
    values = _load(x, i_image, o_channel, m_channel, HEIGHT, WIDTH, CHANNELS)
    b_bias = tl.zeros([BLOCK, 1], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + o_channel, mask=m_channel, other=0).to(tl.float32)
    sums = ()
    for i in tl.static_range(HEIGHT):
        for j in tl.static_range(WIDTH):
            sums = sums + (_add_overlap(b_bias, weights, values, i - KERNEL // 2, j - KERNEL // 2),)
    o_map, m_map = _map(i_image, o_channel, HEIGHT * WIDTH, CHANNELS)
    tl.store(out + o_map, _block_of(sums).to(out.dtype.element_ty), mask=m_channel & m_map)


@triton.jit
def _small_map_gradient_kernel(
    grad,  # [B, H, W, C], contiguous
    x,  # like grad
    parts,  # [chunks of images, C, K, K], contiguous
    batch, images,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (chunk of images, block of channels), channels fastest.
    TAPS: tl.constexpr = KERNEL * KERNEL
    o_channel, m_channel, i_chunk = _channels(CHANNELS, BLOCK)
    sums = (tl.zeros([BLOCK, 1], tl.float32),) * TAPS
    for i_image in range(i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)):
        grads = _load(grad, i_image, o_channel, m_channel, HEIGHT, WIDTH, CHANNELS)
        values = _load(x, i_image, o_channel, m_channel, HEIGHT, WIDTH, CHANNELS)
        following = ()
        for i in tl.static_range(KERNEL):
            for j in tl.static_range(KERNEL):
                b_sum = _add_overlap(sums[i * KERNEL + j], grads, values, i - KERNEL // 2, j - KERNEL // 2)
                following = following + (b_sum,)
        sums = following
    o_tap = tl.arange(0, triton.next_power_of_2(TAPS))[None, :]
    p_parts = parts + (i_chunk.to(tl.int64) * CHANNELS + o_channel) * TAPS + o_tap
    tl.store(p_parts, _block_of(sums), mask=m_channel & (o_tap < TAPS))


def fits(x: Tensor, kernel_size: int) -> bool:
    """Whether these kernels take a map x [B, C, H, W]: two such maps and a kernel fit into a thread's registers; its
    memory is channels-last, and it is not float64."""
    channels, height, width = x.shape[1:]
    small = 2 * height * width + kernel_size**2 <= REGISTERS and kernel_size <= LARGEST_KERNEL
    last = channels_fastest(x[:, None]) and x.permute(0, 2, 3, 1).is_contiguous()
    return small and last and x.numel() > 0 and channels < 2**24 and x.dtype != torch.float64


def _sizes(x: Tensor, kernel_size: int) -> tuple[int, dict[str, Any]]:
    """Blocks of channels, and what both kernels take of a map."""
    channels, height, width = x.shape[1:]
    lanes = 64 if torch.version.hip else 32
    block = min(1024 if interpreting() else lanes, next_power_of_2(channels))
    sizes = {"CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "KERNEL": kernel_size, "BLOCK": block}
    return ceil_divide(channels, block), sizes


@repeated
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, flipped: bool = False) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − K//2 + k] (+ bias[c]), like x; ``flipped`` takes weight[c, K−1−k]."""
    blocks, sizes = _sizes(x, weight.shape[-1])
    out = empty_like_layout(x)
    arguments = {
        "x": x.permute(0, 2, 3, 1), "weight": weight.contiguous(),
        "bias": weight if bias is None else bias.contiguous(), "out": out.permute(0, 2, 3, 1), **sizes,
        "HAS_BIAS": bias is not None, "FLIPPED": flipped,
    }  # fmt: skip
    launch(_small_map_kernel, (x.shape[0] * blocks,), x.device, arguments, num_warps=1)
    return out


@repeated
def weight_gradient(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    """gradient[c,0,k] = Σ_{b,i} grad[b,c,i] · x[b,c, i − K//2 + k], [C,1,K,K]."""
    batch, channels = x.shape[:2]
    blocks, sizes = _sizes(x, kernel_size)
    images = max(1, batch * blocks // PROGRAMS)
    chunks = ceil_divide(batch, images)
    parts = torch.empty((chunks, channels * kernel_size**2), dtype=torch.float32, device=x.device)
    arguments = {
        "grad": grad.permute(0, 2, 3, 1), "x": x.permute(0, 2, 3, 1), "parts": parts, "batch": batch,
        "images": images, **sizes,
    }  # fmt: skip
    launch(_small_map_gradient_kernel, (chunks * blocks,), x.device, arguments, num_warps=1)
    return sum_rows(parts, 1, x.dtype).view(channels, 1, kernel_size, kernel_size)
