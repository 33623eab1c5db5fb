"""ContMix's backward pass where windows are shared: two kernels, neither of which stores a logit.

    p = exp2(l − log2 Σ exp2),   dp = value @ gradᵀ,   δ = Σ_c grad · out,   ds = p ∘ (dp − δ)           all [S, P]

As in the forward pass, a program keeps one (tile of the outputs of a window, head). It takes the window's positions
block by block, and for each block walks over images, so that the gradients of bias and rpb, sums of ds over images,
stay in registers. One exponential serves these, value's gradient, p @ grad, projected keys', ds @ query, and query's,
dsᵀ @ projected, which adds to that of the blocks before. Value's and projected keys' come as one part per tile; a small
kernel sums the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Targets, Tensors, adding, launch_on, problem_of, reference_gradients
from kernels.contmix.configs import SHARED, Shared, backward_heuristic
from kernels.contmix.forward_shared import shared_arguments
from kernels.contmix.tiles import at_head, key_scale, load_biases, load_keys, load_outputs, store_outputs
from kernels.launch import ceil_divide
from kernels.neighborhood.tables import fold
from kernels.products import LOG2_E, dot
from kernels.tuning import tunable
from kernels.views import at, view
from kernels.window_parts import sum_parts
from kernels.windows_triton import load_pixels, offsets, pixels_of_window, rpb_base, store_pixels


@triton.jit
def _backward_shared_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    grad,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    previous,  # [B, G, Dq, H, W]: a gradient of query to add to, where ADD
    scratch,  # [B, G, Dq, H, W]: grad_query of the blocks so far, written where there are several
    grad_query,  # [B, G, Dq, H, W]: written
    value_parts,  # [B, G, Dv, tiles · windows, K²]: value's gradients, written
    key_parts,  # [B, G, Dq, tiles · windows, K²]: projected keys' gradients, written
    partial,  # [chunks, G, H, W, S · BLOCKS]: sums of ds over a chunk of images, written
    totals,  # [chunks, G, tiles · windows, S · BLOCKS]: the same, over the outputs of a tile, written
    sizes, walk,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    batch, groups, height, width = sizes
    tiles, windows, images = walk
    i_place, i_rest = tl.program_id(0) % (tiles * windows), tl.program_id(0) // (tiles * windows)
    i_group, i_chunk = (i_rest % groups).to(tl.int64), (i_rest // groups).to(tl.int64)
    dtype: tl.constexpr = query.ptr.dtype.element_ty
    pixels = pixels_of_window(i_place % tiles, i_place // tiles, height, width, KERNEL, KERNEL, PIXELS)
    rpb, o_base = at(rpb, 0, i_group), rpb_base(rpb, pixels, KERNEL, KERNEL)[None, :]
    first = i_chunk.to(tl.int32) * images
    last = tl.minimum(first + images, batch)
    p_partial = partial.ptr + i_chunk * partial.b + i_group * partial.g
    p_partial += ((pixels.row * width + pixels.column) * partial.w)[None, :]
    p_totals = totals.ptr + i_chunk * totals.b + i_group * totals.g + i_place * totals.h
    for i_block in range(BLOCKS):
        o_position = i_block * STEPS + tl.arange(0, STEPS)
        m_position = o_position < KERNEL * KERNEL
        b_bias = load_biases(bias, rpb, o_base, o_position[:, None], m_position[:, None], KERNEL, ACCUMULATOR) * LOG2_E
        b_total = tl.zeros([STEPS, PIXELS], ACCUMULATOR)
        o_row, o_column = pixels.start_h + o_position // KERNEL, pixels.start_w + o_position % KERNEL
        o_value = o_row.to(OFFSET) * value.h + o_column.to(OFFSET) * value.w
        for i_image in range(first, last):
            i_batch = tl.cast(i_image, tl.int64)
            queries = at_head(query, i_batch, i_group, QUERY_CHANNELS)
            values, grads = at_head(value, i_batch, i_group, CHANNELS), at_head(grad, i_batch, i_group, CHANNELS)
            outs, stats = at_head(out, i_batch, i_group, CHANNELS), at(statistics, i_batch, i_group)
            of_value = at_head(value_parts, i_batch, i_group, CHANNELS)
            of_keys = at_head(key_parts, i_batch, i_group, QUERY_CHANNELS)
            # [P, Dq], [P, Dv], [P, Dv]; an output that is not there repeats one that is, but has no gradient
            o_query = offsets(queries, pixels, OFFSET)
            b_query = load_pixels(queries, o_query, pixels.mask | True, QUERY_CHANNELS, BLOCK_QUERY)
            b_grad = load_pixels(grads, offsets(grads, pixels, OFFSET), pixels.mask, CHANNELS, BLOCK_CHANNELS)
            b_out = load_pixels(outs, offsets(outs, pixels, OFFSET), pixels.mask, CHANNELS, BLOCK_CHANNELS)
            b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), 1)
            b_statistics = tl.load(stats.ptr + offsets(statistics, pixels, OFFSET)) * LOG2_E
            projections = at_head(projected, i_batch, i_group, QUERY_CHANNELS)
            keys = load_keys(projections, o_position, m_position, QUERY_CHANNELS, BLOCK_QUERY, dtype)
            b_value = load_pixels(values, o_value, m_position, CHANNELS, BLOCK_CHANNELS)
            b_logits = tl.zeros([STEPS, PIXELS], ACCUMULATOR)
            for half in tl.static_range(len(keys)):
                b_logits = dot(keys[half], tl.trans(b_query), b_logits, UPCAST)
            b_weight = tl.exp2(b_logits * (LOG2_E * key_scale(dtype)) + b_bias - b_statistics[None, :])
            b_products = dot(b_value, tl.trans(b_grad), tl.zeros([STEPS, PIXELS], ACCUMULATOR), UPCAST)
            b_part = dot(b_weight.to(dtype), b_grad, tl.zeros([STEPS, BLOCK_CHANNELS], ACCUMULATOR), UPCAST)
            store_pixels(of_value, i_place * of_value.h + o_position * of_value.w, m_position, b_part, CHANNELS)
            b_grad_logits = b_weight * (b_products - b_delta[None, :])
            b_total += b_grad_logits
            b_grad_logits = b_grad_logits.to(dtype)
            b_part = dot(b_grad_logits, b_query, tl.zeros([STEPS, BLOCK_QUERY], ACCUMULATOR), UPCAST)
            store_pixels(of_keys, i_place * of_keys.h + o_position * of_keys.w, m_position, b_part, QUERY_CHANNELS)
            b_sum = dot(tl.trans(b_grad_logits), keys[0], tl.zeros([PIXELS, BLOCK_QUERY], ACCUMULATOR), UPCAST)
            b_sum *= key_scale(dtype)
            if i_block > 0:
                b_sum += load_outputs(scratch, i_batch, i_group, pixels, QUERY_CHANNELS, BLOCK_QUERY, OFFSET)
            elif ADD:
                b_sum += load_outputs(previous, i_batch, i_group, pixels, QUERY_CHANNELS, BLOCK_QUERY, OFFSET)
            if i_block < BLOCKS - 1:
                store_outputs(scratch, i_batch, i_group, pixels, b_sum, QUERY_CHANNELS, OFFSET)
            else:
                store_outputs(grad_query, i_batch, i_group, pixels, b_sum, QUERY_CHANNELS, OFFSET)
        tl.store(p_partial + o_position[:, None], b_total, mask=pixels.mask[None, :])
        tl.store(p_totals + o_position, tl.sum(b_total, 1))
        # The next block reads what is in scratch now, perhaps by other threads.
        tl.debug_barrier()


@tunable(
    SHARED,
    backward_heuristic,
    problem=problem_of,
    reference=reference_gradients,
    name="contmix.shared.backward",
)
def backward_shared(tensors: Tensors, targets: Targets, *, config: Shared) -> tuple[Tensor, ...]:
    """Fills the targets."""
    arguments, new_sums = shared_arguments(tensors, config), tensors.statistics.new_empty
    batch, groups, channels, height, width = tensors.value.shape
    kernel_size, query_channels = tensors.kernel_size, tensors.query.shape[2]
    tiles, windows, images = arguments["walk"]
    places, positions = tiles * windows, arguments["BLOCKS"] * config.steps
    chunks = ceil_divide(batch, images)
    partial = new_sums((chunks, groups, height, width, positions))
    totals = new_sums((chunks, groups, places, positions))
    scratch = targets.query
    if arguments["BLOCKS"] > 1 and scratch.dtype != partial.dtype:
        scratch = torch.empty_like(scratch, dtype=partial.dtype)
    if places == 1:  # the one window is the map, and its parts are the gradients
        value_parts, key_parts = targets.value.flatten(3).unsqueeze(3), targets.projected.movedim(3, 0)[None]
    else:
        value_parts = tensors.value.new_empty((batch, groups, places, kernel_size**2, channels)).movedim(-1, 2)
        key_parts = tensors.value.new_empty((places, kernel_size**2, batch, groups, query_channels))
    arguments |= {
        **adding(targets), "value_parts": view(value_parts, "b g c h w"), "key_parts": view(key_parts, "h w b g c"),
        "scratch": view(scratch, "b g c h w"), "partial": view(partial, "b g h w k"), "totals": view(totals, "b g h k"),
    }  # fmt: skip
    if torch.version.hip:  # whose compiler holds loads ahead in registers
        arguments["num_stages"] = min(2, config.num_stages)
    # One program per (tile, window, group, chunk of images).
    launch_on(tensors, _backward_shared_kernel, places * groups * chunks, **arguments)
    if places > 1:
        sum_parts(value_parts, targets.value, (kernel_size, kernel_size), tiles)
    fold(
        partial, targets.rpb, totals=totals, bias=targets.bias, pieces=key_parts if places > 1 else None,
        total=targets.projected, seen=kernel_size, height=height,
    )  # fmt: skip
    return targets.query, targets.value, targets.projected, targets.bias, targets.rpb
