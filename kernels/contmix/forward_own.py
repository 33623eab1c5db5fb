"""ContMix's forward pass where nearly every output has a window of its own.

A program takes pairs of adjacent outputs of several heads, whose channels are adjacent in memory. Logits of a step, all
of a small window or one row of a large one, are matrix products; the weights are then split into registers, one [P, G]
block per window position, and multiply the values that a pair sees: K + 1 of a row, of which the second output takes
the last K, or the first K where its window is clamped to the first's.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Tensors, launch_on, problem_of, reference_forward
from kernels.contmix.configs import OWN, Own, own_heuristic, steps_of_own
from kernels.contmix.tiles import halves, key_scale, load_biases, load_heads, pixels_of_pairs, rpb_base, store_heads
from kernels.launch import ceil_divide, next_power_of_2
from kernels.products import LOG2_E, dot
from kernels.registers import unstack
from kernels.tuning import tunable
from kernels.views import at
from kernels.windows_triton import offsets


@triton.jit
def bias_of_step(
    bias, rpb, o_base, i_step,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """bias + rpb [G, 2P, S] of ROWS rows of the windows."""
    o_step = tl.arange(0, STEPS)[None, None, :]
    return load_biases(bias, rpb, o_base, i_step * ROWS * KERNEL + o_step, o_step < ROWS * KERNEL, KERNEL, ACCUMULATOR)


@triton.jit
def logits_of_pairs(
    b_query, b_bias, projected, i_step, i_head, groups, KERNEL: tl.constexpr, ROWS: tl.constexpr,
    QUERY_CHANNELS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits [G, 2P, S] of a step, ROWS rows of the windows, onto bias + rpb; and the keys [S, G, Dq], their first
    halves. b_query [G, 2P, Dq]."""
    o_step = tl.arange(0, b_bias.shape[2])
    o_position, m_position = i_step * ROWS * KERNEL + o_step, o_step < ROWS * KERNEL
    b_keys = load_heads(
        projected, o_position * projected.k, m_position, i_head, groups,
        QUERY_CHANNELS, b_query.shape[0], b_query.shape[2],
    )  # fmt: skip
    keys = halves(b_keys, b_query.dtype)
    b_logits = b_bias * (1 / key_scale(b_query.dtype))
    for half in tl.static_range(len(keys)):
        b_logits = dot(b_query, tl.permute(keys[half], [1, 2, 0]), b_logits, UPCAST)
    return b_logits * (LOG2_E * key_scale(b_query.dtype)), keys[0]


@triton.jit
def values_of_pairs(
    values, o_value, m_moved, i_head, groups, FIRST: tl.constexpr, LAST: tl.constexpr, KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values [P, G, Dv] that pairs see in rows FIRST to LAST - 1 of a step, K + 1 of each row; the last is 0 where a
    pair shares its window."""
    seen = ()
    for row in tl.static_range(FIRST, LAST):
        for i in tl.static_range(KERNEL + 1):
            m_pair = m_moved if i == KERNEL else m_moved | True
            o_seen = o_value + row * values.h + i * values.w
            seen = seen + (load_heads(values, o_seen, m_pair, i_head, groups, CHANNELS, HEADS, BLOCK),)
    return seen


@triton.jit
def weights_of_pairs(b_weight):
    """[G, 2P, S] as 2 · S blocks [P, G, 1]: first those of the pairs' first outputs."""
    HEADS: tl.constexpr = b_weight.shape[0]
    PAIRS: tl.constexpr = b_weight.shape[1] // 2
    STEPS: tl.constexpr = b_weight.shape[2]
    b_weight = tl.reshape(tl.permute(b_weight, [1, 0, 2]), [PAIRS, 2, HEADS, STEPS])
    return unstack(tl.reshape(tl.permute(b_weight, [0, 2, 1, 3]), [PAIRS, HEADS, 2 * STEPS]))


@triton.jit
def _forward_own_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    sizes, tiles, head_blocks, images,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the windows are a step of S = STEPS positions; KERNEL is a multiple of ROWS."""
    batch, groups, height, width, first_row, last_row = sizes
    i_program = tl.program_id(0)
    i_tile, i_head = i_program % tiles, i_program // tiles % head_blocks * HEADS
    i_first = i_program // (tiles * head_blocks) * images
    o_output, o_pair = tl.arange(0, 2 * PAIRS), i_tile * PAIRS + tl.arange(0, PAIRS)
    outputs = pixels_of_pairs(i_tile * PAIRS + o_output // 2, o_output % 2, first_row, last_row, height, width, KERNEL)
    first = pixels_of_pairs(o_pair, 0, first_row, last_row, height, width, KERNEL)
    second = pixels_of_pairs(o_pair, 1, first_row, last_row, height, width, KERNEL)
    m_moved = second.start_w > first.start_w
    m_second = m_moved[:, None, None]
    o_head = i_head + tl.arange(0, HEADS)
    m_head = o_head < groups
    o_head = tl.minimum(o_head, groups - 1)
    o_base = (o_head * rpb.g)[:, None, None] + rpb_base(rpb, outputs, KERNEL)[None, :, None]
    b_bias = bias_of_step(bias, rpb, o_base, 0, KERNEL, ROWS, STEPS, ACCUMULATOR)
    for i_image in range(i_first, tl.minimum(i_first + images, batch)):
        i_batch = tl.cast(i_image, tl.int64)
        queries, keys, values = at(query, i_batch, 0), at(projected, i_batch, 0), at(value, i_batch, 0)
        outs, sums = at(out, i_batch, 0), at(statistics, i_batch, 0)
        # [G, 2P, Dq]
        b_query = load_heads(
            queries, offsets(query, outputs, OFFSET), o_output >= 0, i_head, groups, QUERY_CHANNELS, HEADS, BLOCK_QUERY
        )
        b_query = tl.permute(b_query, [1, 0, 2])

        # [G, 2P], [G, 2P], [P, G, Dv], [P, G, Dv]
        b_max = tl.full([HEADS, 2 * PAIRS], float("-inf"), ACCUMULATOR)
        b_total = tl.zeros([HEADS, 2 * PAIRS], ACCUMULATOR)
        b_first = tl.zeros([PAIRS, HEADS, BLOCK_CHANNELS], ACCUMULATOR)
        b_second = tl.zeros([PAIRS, HEADS, BLOCK_CHANNELS], ACCUMULATOR)
        for i_step in range(KERNEL // ROWS):
            # Two rows are loaded before they are needed: the softmax takes as long as they do.
            AHEAD: tl.constexpr = 2 if ROWS > 1 else ROWS
            o_value = (first.start_h + i_step * ROWS).to(OFFSET) * value.h + first.start_w.to(OFFSET) * value.w
            seen = values_of_pairs(
                values, o_value, m_moved, i_head, groups, 0, AHEAD, KERNEL, CHANNELS, HEADS, BLOCK_CHANNELS
            )
            if KERNEL > ROWS:
                b_bias = bias_of_step(bias, rpb, o_base, i_step, KERNEL, ROWS, STEPS, ACCUMULATOR)
            b_logits, _keys = logits_of_pairs(
                b_query, b_bias, keys, i_step, i_head, groups, KERNEL, ROWS, QUERY_CHANNELS, UPCAST
            )
            b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=2))
            b_weight = tl.exp2(b_logits - b_new_max[:, :, None])
            b_rescale = tl.exp2(b_max - b_new_max)
            b_total = b_total * b_rescale + tl.sum(b_weight, axis=2)
            b_max = b_new_max
            if KERNEL > ROWS:
                rescale = weights_of_pairs(b_rescale[:, :, None])
                b_first, b_second = b_first * rescale[0], b_second * rescale[1]
            weights = weights_of_pairs(b_weight)
            seen = seen + values_of_pairs(
                values, o_value, m_moved, i_head, groups, AHEAD, ROWS, KERNEL, CHANNELS, HEADS, BLOCK_CHANNELS
            )
            for row in tl.static_range(ROWS):
                for i in tl.static_range(KERNEL):
                    b_value = seen[row * (KERNEL + 1) + i].to(ACCUMULATOR)
                    b_first += weights[row * KERNEL + i] * b_value
                    if i == 0:
                        b_value = tl.where(m_second, seen[row * (KERNEL + 1) + KERNEL].to(ACCUMULATOR), b_value)
                    b_weight = weights[STEPS + row * KERNEL + i]
                    b_before = weights[STEPS + row * KERNEL + (i + KERNEL - 1) % KERNEL]
                    b_second += tl.where(m_second, b_before, b_weight) * b_value

        totals = weights_of_pairs(b_total[:, :, None])
        o_first, o_second = offsets(out, first, OFFSET), offsets(out, second, OFFSET)
        store_heads(outs, o_first, first.mask, i_head, groups, b_first / totals[0], CHANNELS)
        store_heads(outs, o_second, second.mask, i_head, groups, b_second / totals[1], CHANNELS)
        p_statistics = sums.ptr + (o_head * statistics.g)[:, None] + offsets(statistics, outputs, OFFSET)[None, :]
        m_statistics = m_head[:, None] & outputs.mask[None, :]
        tl.store(p_statistics, (b_max + tl.log2(b_total)) / LOG2_E, mask=m_statistics)


def own_arguments(tensors: Tensors, config: Own, tiles: int) -> tuple[dict[str, Any], int]:
    """What the kernels of own windows take, and their programs: one per (tile of outputs, block of heads, images)."""
    batch, groups, *_ = tensors.sizes
    rows, steps = steps_of_own(tensors.kernel_size)
    head_blocks = ceil_divide(groups, config.heads)
    arguments = {
        "tiles": tiles, "head_blocks": head_blocks, "images": config.images,
        "HEADS": config.heads, "ROWS": rows, "STEPS": steps, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    return arguments, tiles * head_blocks * ceil_divide(batch, config.images)


@tunable(OWN, own_heuristic, problem=problem_of, reference=reference_forward, name="contmix.own")
def forward_own(tensors: Tensors, *, config: Own) -> Tensor:
    """Fills ``out`` and ``statistics``."""
    channels, height, width = tensors.value.shape[2:]
    arguments, programs = own_arguments(tensors, config, ceil_divide(height * ceil_divide(width, 2), config.pairs))
    arguments |= {"PAIRS": config.pairs, "BLOCK_CHANNELS": max(8, next_power_of_2(channels))}
    launch_on(tensors, _forward_own_kernel, programs, **arguments)
    return tensors.out
