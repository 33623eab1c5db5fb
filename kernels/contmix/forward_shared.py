"""ContMix's forward pass where windows are shared: sums over window positions are plain matrix products.

A program keeps one (tile of the outputs of a window, head) and walks over images, so that bias + rpb is gathered once
and stays in registers, S positions a block:

    l [P, S] = query [P, Dq] @ projected [Dq, S] · log2 e + table,     out [P, Dv] += exp2(l − max) @ value [S, Dv]
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Tensors, launch_on, problem_of, reference_forward
from kernels.contmix.configs import SHARED, Shared, block, shared_heuristic
from kernels.contmix.tiles import at_head, key_scale, load_biases, load_keys, store_outputs
from kernels.launch import ceil_divide
from kernels.products import LOG2_E, dot
from kernels.tuning import tunable
from kernels.views import at
from kernels.windows import windows_and_most
from kernels.windows_triton import load_pixels, offsets, pixels_of_window, rpb_base


@triton.jit
def _tables(
    bias, rpb, o_base, KERNEL: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """bias + rpb in BLOCKS blocks [P, S]."""
    tables = ()
    for i in tl.static_range(BLOCKS):
        o_position = (i * STEPS + tl.arange(0, STEPS))[None, :]
        b_bias = load_biases(bias, rpb, o_base[:, None], o_position, o_position < KERNEL * KERNEL, KERNEL, ACCUMULATOR)
        tables = tables + (b_bias * LOG2_E,)
    return tables


@triton.jit
def _forward_shared_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    sizes, walk,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    batch, groups, height, width = sizes
    tiles, windows, images = walk
    i_program = tl.program_id(0)
    i_tile, i_window = i_program % tiles, i_program // tiles % windows
    i_group = (i_program // (tiles * windows) % groups).to(tl.int64)
    i_first = i_program // (tiles * windows) // groups * images
    pixels = pixels_of_window(i_tile, i_window, height, width, KERNEL, KERNEL, PIXELS)
    o_base = i_group * rpb.g + rpb_base(rpb, pixels, KERNEL, KERNEL)
    tables = _tables(bias, rpb, o_base, KERNEL, STEPS, BLOCKS, ACCUMULATOR)

    for i_batch in range(i_first, tl.minimum(i_first + images, batch)):
        i_image = tl.cast(i_batch, tl.int64)
        queries, keys, values = (
            at_head(query, i_image, i_group, QUERY_CHANNELS),
            at_head(projected, i_image, i_group, QUERY_CHANNELS),
            at_head(value, i_image, i_group, CHANNELS),
        )
        # [P, Dq]; an output that is not there repeats one that is, so that nothing overflows
        o_query = offsets(queries, pixels, OFFSET)
        b_query = load_pixels(queries, o_query, pixels.mask | True, QUERY_CHANNELS, BLOCK_QUERY)
        # [P], [P], [P, Dv]
        b_max = tl.full([PIXELS], float("-inf"), ACCUMULATOR)
        b_total = tl.zeros([PIXELS], ACCUMULATOR)
        b_sum = tl.zeros([PIXELS, BLOCK_CHANNELS], ACCUMULATOR)
        for i in tl.static_range(BLOCKS):
            o_position = i * STEPS + tl.arange(0, STEPS)
            m_position = o_position < KERNEL * KERNEL
            b_logits = tl.zeros([PIXELS, STEPS], ACCUMULATOR)
            b_keys = load_keys(keys, o_position, m_position, QUERY_CHANNELS, BLOCK_QUERY, b_query.dtype)
            for half in tl.static_range(len(b_keys)):
                b_logits = dot(b_query, tl.trans(b_keys[half]), b_logits, UPCAST)
            b_logits = b_logits * (LOG2_E * key_scale(b_query.dtype)) + tables[i]
            b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
            b_weight = tl.exp2(b_logits - b_new_max[:, None])
            b_rescale = tl.exp2(b_max - b_new_max)
            b_total = b_total * b_rescale + tl.sum(b_weight, axis=1)
            b_max = b_new_max
            o_row, o_column = pixels.start_h + o_position // KERNEL, pixels.start_w + o_position % KERNEL
            o_value = o_row.to(OFFSET) * values.h + o_column.to(OFFSET) * values.w
            b_value = load_pixels(values, o_value, m_position, CHANNELS, BLOCK_CHANNELS)
            b_sum = dot(b_weight.to(b_value.dtype), b_value, b_sum * b_rescale[:, None], UPCAST)
        store_outputs(out, i_image, i_group, pixels, b_sum / b_total[:, None], CHANNELS, OFFSET)
        sums = at(statistics, i_image, i_group)
        tl.store(sums.ptr + offsets(statistics, pixels, OFFSET), (b_max + tl.log2(b_total)) / LOG2_E, mask=pixels.mask)


def shared_arguments(tensors: Tensors, config: Shared) -> dict[str, Any]:
    """What both kernels of shared windows take; ``walk`` is tiles per window, windows, and images per program."""
    kernel_size = tensors.kernel_size
    windows, most = windows_and_most((kernel_size, kernel_size), *tensors.value.shape[3:])
    return {
        "walk": (ceil_divide(most, config.pixels), windows, config.images),
        "PIXELS": config.pixels, "STEPS": config.steps, "BLOCKS": ceil_divide(kernel_size**2, config.steps),
        "BLOCK_CHANNELS": block(tensors.value.shape[2]), "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


@tunable(SHARED, shared_heuristic, problem=problem_of, reference=reference_forward, name="contmix.shared")
def forward_shared(tensors: Tensors, *, config: Shared) -> Tensor:
    """Fills ``out`` and ``statistics``."""
    batch, groups, *_ = tensors.sizes
    arguments = shared_arguments(tensors, config)
    # One program per (tile of outputs, window, group, images).
    tiles, windows, images = arguments["walk"]
    programs = tiles * windows * groups * ceil_divide(batch, images)
    launch_on(tensors, _forward_shared_kernel, programs, **arguments)
    return tensors.out
