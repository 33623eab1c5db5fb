"""The first kernel of ContMix's backward pass where nearly every output has a window of its own.

Σ_c grad · value is a matrix product: of a tile of outputs, and all inputs that any of them sees; each output gathers
its own.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Rows, Tensors, adding, launch_on, problem_of, reference_gradients
from kernels.contmix.configs import OWN, Own, block, grad_own_heuristic, steps_of_own
from kernels.contmix.forward_own import bias_of_step, logits_of_pairs, own_arguments
from kernels.contmix.tiles import key_scale, load_heads, rpb_base, store_heads
from kernels.launch import ceil_divide
from kernels.products import LOG2_E, dot
from kernels.tuning import tunable
from kernels.views import at, view
from kernels.windows_triton import offsets, pixels_at, window_start


@triton.jit
def _places(i_head, o_output, o_seen, SEEN: tl.constexpr, OUTPUTS: tl.constexpr):
    """Where products of an output and an input that its tile sees are in the order of ``_in_order``."""
    o_output = o_output // 8 * 32 + o_output % 8
    o_seen = (o_seen // 8 * 2 + o_seen % 2) * (4 * OUTPUTS) + o_seen // 2 % 4 * 8
    return i_head * (OUTPUTS * SEEN) + o_seen + o_output


@triton.jit
def _in_order(b, HEADS: tl.constexpr, OUTPUTS: tl.constexpr, SEEN: tl.constexpr):
    """[G, O, SEEN] as [G · O · SEEN], in an order in which a gather meets no bank of shared memory twice: a warp's 32
    threads hold 8 adjacent outputs by 4 pairs of adjacent inputs."""
    b = tl.reshape(b, [HEADS, OUTPUTS // 8, 8, SEEN // 8, 4, 2])
    return tl.reshape(tl.permute(b, [0, 3, 5, 1, 4, 2]), [HEADS * OUTPUTS * SEEN])


@triton.jit
def _grad_logits_own_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    grad,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    previous,  # [B, G, Dq, H, W]: a gradient of query to add to, where ADD
    grad_query,  # [B, G, Dq, H, W]: written
    weights,  # [B, G, rows, K / ROWS, W, S]: p, written; NaN where an output's gradient is not finite
    grad_logits,  # the same: ds, written
    sizes, tiles, head_blocks, images,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    SEEN: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    batch, groups, height, width, first_row, last_row = sizes
    i_program = tl.program_id(0)
    i_tile, i_head = i_program % tiles, i_program // tiles % head_blocks * HEADS
    i_first = i_program // (tiles * head_blocks) * images
    o_output, o_position, o_seen = tl.arange(0, OUTPUTS), tl.arange(0, STEPS), tl.arange(0, SEEN)
    tiles_w = tl.cdiv(width, COLUMNS)
    row, column = first_row + i_tile // tiles_w * (OUTPUTS // COLUMNS), i_tile % tiles_w * COLUMNS
    o_row, o_column = row + o_output // COLUMNS, column + o_output % COLUMNS
    outputs = pixels_at(o_row, o_column, last_row, height, width, KERNEL)
    # What the tile sees in a step, row by row.
    SEEN_W: tl.constexpr = COLUMNS + KERNEL - 1
    start_h, start_w = window_start(row, height, KERNEL, 1), window_start(column, width, KERNEL, 1)
    seen_h, seen_w = start_h + o_seen // SEEN_W, start_w + o_seen % SEEN_W
    m_seen = (o_seen < (ROWS + OUTPUTS // COLUMNS - 1) * SEEN_W) & (seen_w < width)
    # [O, S]: which of these a window's positions are; where there is none, the window's first.
    o_inside = tl.where(o_position < ROWS * KERNEL, o_position // KERNEL * SEEN_W + o_position % KERNEL, 0)
    o_inside = ((outputs.start_h - start_h) * SEEN_W + outputs.start_w - start_w)[:, None] + o_inside[None, :]
    o_inside = _places(tl.arange(0, HEADS)[:, None, None], o_output[None, :, None], o_inside[None, :, :], SEEN, OUTPUTS)
    o_inside = tl.reshape(o_inside, [HEADS * OUTPUTS * STEPS])
    o_head = i_head + tl.arange(0, HEADS)
    m_head = o_head < groups
    o_head = tl.minimum(o_head, groups - 1)
    o_base = (o_head * rpb.g)[:, None, None] + rpb_base(rpb, outputs, KERNEL)[None, :, None]
    o_weight = (outputs.row - first_row).to(OFFSET) * weights.h + outputs.column.to(OFFSET) * weights.w
    o_weight = o_weight[None, :, None] + o_position[None, None, :]
    o_weight += (o_head.to(OFFSET) * weights.g)[:, None, None]
    m_weight = (m_head[:, None] & outputs.mask[None, :])[:, :, None]
    b_bias = bias_of_step(bias, rpb, o_base, 0, KERNEL, ROWS, STEPS, ACCUMULATOR)
    for i_image in range(i_first, tl.minimum(i_first + images, batch)):
        i_batch = tl.cast(i_image, tl.int64)
        queries, keys, values = at(query, i_batch, 0), at(projected, i_batch, 0), at(value, i_batch, 0)
        # [G, O, Dq]
        b_query = load_heads(
            queries, offsets(query, outputs, OFFSET), o_output >= 0, i_head, groups, QUERY_CHANNELS, HEADS, BLOCK_QUERY
        )
        b_query = tl.permute(b_query, [1, 0, 2])
        grads, outs = at(grad, i_batch, 0), at(out, i_batch, 0)
        # [O, G, Dv]; outputs that are not there have no gradient
        b_grad = load_heads(
            grads, offsets(grad, outputs, OFFSET), outputs.mask, i_head, groups, CHANNELS, HEADS, BLOCK_CHANNELS
        )
        b_out = load_heads(
            outs, offsets(out, outputs, OFFSET), outputs.mask, i_head, groups, CHANNELS, HEADS, BLOCK_CHANNELS
        )
        b_delta = tl.trans(tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), 2))
        # 0, or NaN where a gradient is not finite.
        b_spoilt = tl.trans(tl.sum(b_grad.to(ACCUMULATOR) * 0, 2))
        b_grad = tl.permute(b_grad, [1, 0, 2])
        p_statistics = at(statistics, i_batch, 0).ptr + (o_head * statistics.g)[:, None]
        b_statistics = tl.load(p_statistics + offsets(statistics, outputs, OFFSET)[None, :]) * LOG2_E

        b_sum = tl.zeros([HEADS, OUTPUTS, BLOCK_QUERY], ACCUMULATOR)
        for i_step in range(KERNEL // ROWS):
            if KERNEL > ROWS:
                b_bias = bias_of_step(bias, rpb, o_base, i_step, KERNEL, ROWS, STEPS, ACCUMULATOR)
            o_value = (seen_h + i_step * ROWS).to(OFFSET) * value.h + seen_w.to(OFFSET) * value.w
            m_value = m_seen & (seen_h + i_step * ROWS < height)
            b_value = load_heads(values, o_value, m_value, i_head, groups, CHANNELS, HEADS, BLOCK_CHANNELS)
            b_products = tl.zeros([HEADS, OUTPUTS, SEEN], ACCUMULATOR)
            b_products = dot(b_grad, tl.permute(b_value, [1, 2, 0]), b_products, UPCAST)
            # A gather along the only axis goes by shared memory, which takes less than shuffles.
            b_products = tl.gather(_in_order(b_products, HEADS, OUTPUTS, SEEN), o_inside, 0)
            b_products = tl.reshape(b_products, [HEADS, OUTPUTS, STEPS]) - b_delta[:, :, None]
            b_logits, b_keys = logits_of_pairs(
                b_query, b_bias, keys, i_step, i_head, groups, KERNEL, ROWS, QUERY_CHANNELS, UPCAST
            )
            b_weight = tl.exp2(b_logits - b_statistics[:, :, None])
            b_grad_logits = (b_weight * b_products).to(b_query.dtype)
            b_sum = dot(b_grad_logits, tl.permute(b_keys, [1, 0, 2]), b_sum, UPCAST)
            o_stored = o_weight + (i_step * weights.k).to(OFFSET)
            b_weight = (b_weight + b_spoilt[:, :, None]).to(b_query.dtype)
            tl.store(at(weights, i_batch, 0).ptr + o_stored, b_weight, mask=m_weight)
            tl.store(at(grad_logits, i_batch, 0).ptr + o_stored, b_grad_logits, mask=m_weight)

        b_sum = tl.permute(b_sum, [1, 0, 2]) * key_scale(b_query.dtype)
        o_target = offsets(grad_query, outputs, OFFSET)
        if ADD:
            b_sum += load_heads(
                at(previous, i_batch, 0), offsets(previous, outputs, OFFSET), outputs.mask, i_head, groups,
                QUERY_CHANNELS, HEADS, BLOCK_QUERY,
            )  # fmt: skip
        store_heads(at(grad_query, i_batch, 0), o_target, outputs.mask, i_head, groups, b_sum, QUERY_CHANNELS)


@tunable(
    OWN,
    grad_own_heuristic,
    problem=problem_of,
    reference=lambda tensors, _target, previous, _rows: reference_gradients(tensors, previous)[0],
    name="contmix.own.grad_logits",
)
def grad_logits_own(
    tensors: Tensors, grad_query: Tensor, previous: Tensor | None, rows: Rows, *, config: Own
) -> Tensor:
    """Fills ``rows``, and its outputs' gradient of query."""
    sizes, kernel_size, outputs = rows.sizes, tensors.kernel_size, 2 * config.pairs
    kernel_rows, _ = steps_of_own(kernel_size)
    columns = 4 if kernel_rows == kernel_size else 16
    tiles = ceil_divide(sizes.last_row - sizes.first_row + 1, outputs // columns) * ceil_divide(sizes.width, columns)
    arguments, programs = own_arguments(tensors, config, tiles)
    arguments |= {
        **adding(grad_query, previous), "weights": view(rows.weights, "b g h k w c"),
        "grad_logits": view(rows.grad_logits, "b g h k w c"), "sizes": sizes,
        "OUTPUTS": outputs, "COLUMNS": columns,
        "SEEN": block((kernel_rows + outputs // columns - 1) * (columns + kernel_size - 1)),
        "BLOCK_CHANNELS": block(tensors.value.shape[2]),
    }  # fmt: skip
    launch_on(tensors, _grad_logits_own_kernel, programs, **arguments)
    return grad_query
