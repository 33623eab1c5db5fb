# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""ContMix's gradients of query and value, and the whole backward pass: no logits in memory, here neither.

With weights p[n,k], dp[n,k] = Σ_c grad[n,c] · value[nbr(n,k),c], δ[n] = Σ_c grad[n,c] · out[n,c] and
ds[n,k] = p[n,k] · (dp[n,k] − δ[n]), the logits' gradient, each gradient computes the weights it needs again from
log Σ_k exp, the one number a pixel that the forward pass leaves:

    grad_query    Σ_k ds[n,k] · projected[:,k]     a program per tile of outputs; it leaves δ for the parameters
    grad_value    Σ_(n,k) p[n,k] · grad[n,:]       a program per tile of inputs: over the windows that hold them where
                                                   windows are shared, else over the outputs whose windows do
    projected keys, bias, rpb                      ``triton_grad_parameters``

That costs Dq + Dv multiply-adds a logit and kernel, on tensor cores where windows are shared. Storing the logits and
ds would move 4·ΣK² elements a pixel; a kernel here reads Dq + 2·Dv and a few.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from autotune.tuner import Trial, Tunable, choose
from kernels.aggregation.triton_kernels import at_least_float32
from kernels.backend import interpreting
from kernels.contmix import eager
from kernels.contmix.triton_tiles import (
    CONFIGS,
    Config,
    Problem,
    Saved,
    cost,
    dot,
    grad_logits,
    heuristic,
    load_pixels,
    outputs_of_tile,
    problem_of,
    tensor_arguments,
    tile_arguments,
    weights_of_tile,
    window_starts,
)
from kernels.launch import ceil_divide, launch
from kernels.windows import Window
from kernels.windows_triton import inverse_neighbour, inverse_steps, split_program

__all__ = ["backward_heuristic", "grad_query", "grad_value", "reference_gradients"]


def backward_heuristic(problem: Problem) -> Config:
    """The forward pass's choice, with more registers for each element: weights, values and gradients live at once."""
    config = heuristic(problem)
    if interpreting():
        return config
    if problem.shared:  # products in float32 keep their operands in registers
        return config if problem.dtype.itemsize == 2 else replace(config, block_pixels=32, block_steps=16)
    smaller = replace(config, block_pixels=config.block_pixels // 2)
    return smaller if smaller.valid(problem) else config


MODULES = ("kernels.windows_triton", "kernels.contmix.triton_tiles", "kernels.contmix.triton_grad_inputs")
GRAD_QUERY, GRAD_VALUE = (
    Tunable(f"contmix.{name}", CONFIGS, backward_heuristic, cost, MODULES, Problem, f"kernels.contmix.examples:{name}")
    for name in ("grad_query", "grad_value")
)


@triton.jit
def _grad_query_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    value_ptr,  # [B, G, Dv, H, W]
    statistics_ptr,  # [B, G, H, W]: log Σ_k exp
    grad_ptr,  # [B, G, Dv, H, W]
    out_ptr,  # [B, G, Dv, H, W]
    delta_ptr,  # [B, G, H, W]: written
    target_ptr,  # [B, G, Dq, H, W]: the gradient of query
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    delta_stride_b, delta_stride_g, delta_stride_h, delta_stride_w,
    target_stride_b, target_stride_g, target_stride_c, target_stride_h, target_stride_w,
    groups, channels, query_channels, height, width, tiles, windows,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_delta = delta_ptr + i_batch * delta_stride_b + i_group * delta_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g

    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels
    o_row, o_column, m_output = outputs_of_tile(i_tile, i_window, height, width, SHARED, KERNEL, BLOCK_PIXELS)
    o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, SHARED, KERNEL)
    # [Dq, P], [C, P], [C, P]
    b_query = load_pixels(
        p_query, o_query, m_query, o_row, o_column, m_output, query_stride_c, query_stride_h, query_stride_w, OFFSET
    )
    b_grad = load_pixels(
        p_grad, o_channel, m_channel, o_row, o_column, m_output, grad_stride_c, grad_stride_h, grad_stride_w, OFFSET
    )
    b_out = load_pixels(
        p_out, o_channel, m_channel, o_row, o_column, m_output, out_stride_c, out_stride_h, out_stride_w, OFFSET
    )
    o_row, o_column = o_row.to(OFFSET), o_column.to(OFFSET)
    b_statistics = tl.load(p_statistics + o_row * statistics_stride_h + o_column * statistics_stride_w)
    b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), axis=0)
    tl.store(p_delta + o_row * delta_stride_h + o_column * delta_stride_w, b_delta, mask=m_output)
    b_query = tl.trans(b_query)

    # [P, Dq]
    b_sum = tl.zeros([BLOCK_PIXELS, BLOCK_QUERY], ACCUMULATOR)
    for first_step in range(0, KERNEL * KERNEL, BLOCK_STEPS):
        b_grad_logits, b_projected = grad_logits(
            b_query, b_grad, b_statistics, b_delta, p_projected, bias_ptr, p_rpb, p_value,
            o_query, m_query, o_channel, m_channel, first_step, o_row, o_column, o_start_h, o_start_w,
            projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
            value_stride_c, value_stride_h, value_stride_w,
            SHARED, KERNEL, ACCUMULATOR, OFFSET, UPCAST, BLOCK_STEPS,
        )  # fmt: skip
        b_sum += dot(b_grad_logits.to(b_projected.dtype), tl.trans(b_projected), ACCUMULATOR, UPCAST)

    tl.store(
        p_target
        + (o_query.to(OFFSET) * target_stride_c)[:, None]
        + (o_row * target_stride_h + o_column * target_stride_w)[None, :],
        tl.trans(b_sum).to(target_ptr.dtype.element_ty),
        mask=m_query[:, None] & m_output[None, :],
    )


@triton.jit
def _grad_value_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    statistics_ptr,  # [B, G, H, W]
    grad_ptr,  # [B, G, Dv, H, W]
    target_ptr,  # [B, G, Dv, H, W]: the gradient of value
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_b, target_stride_g, target_stride_c, target_stride_h, target_stride_w,
    groups, channels, query_channels, height, width, tiles, windows, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    # Inputs come in blocks of their own, J of them: outputs take BLOCK_PIXELS where windows are shared, inputs here.
    BLOCK_INPUTS: tl.constexpr = BLOCK_STEPS if SHARED else BLOCK_PIXELS
    i_input, _i_one, i_group, i_batch = split_program(tl.cdiv(height * width, BLOCK_INPUTS), 1, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g

    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels
    o_input = i_input * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    m_input = o_input < height * width
    o_input_h, o_input_w = o_input // width, o_input % width

    # [C, J]
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_INPUTS], ACCUMULATOR)
    if SHARED:
        for i_place in range(tiles * windows):
            i_window = i_place // tiles
            o_row, o_column, m_output = outputs_of_tile(
                i_place % tiles, i_window, height, width, SHARED, KERNEL, BLOCK_PIXELS
            )
            o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, SHARED, KERNEL)
            # [J]: where in this window the inputs are, if they are
            o_kernel_h, o_kernel_w = o_input_h - o_start_h, o_input_w - o_start_w
            m_kernel = m_input & (o_kernel_h >= 0) & (o_kernel_h < KERNEL) & (o_kernel_w >= 0) & (o_kernel_w < KERNEL)
            b_query = load_pixels(
                p_query, o_query, m_query, o_row, o_column, m_output,
                query_stride_c, query_stride_h, query_stride_w, OFFSET,
            )  # fmt: skip
            # An output that is not there has no gradient, and so adds nothing.
            b_grad = load_pixels(
                p_grad, o_channel, m_channel, o_row, o_column, m_output,
                grad_stride_c, grad_stride_h, grad_stride_w, OFFSET,
            )  # fmt: skip
            o_statistics = o_row.to(OFFSET) * statistics_stride_h + o_column.to(OFFSET) * statistics_stride_w
            o_rpb_h = (KERNEL - 1 - o_row)[:, None] + o_input_h[None, :]
            o_rpb_w = (KERNEL - 1 - o_column)[:, None] + o_input_w[None, :]
            # [P, J]
            b_weight, _b_projected = weights_of_tile(
                tl.trans(b_query), tl.load(p_statistics + o_statistics), p_projected, bias_ptr, p_rpb,
                o_query, m_query, o_kernel_h * KERNEL + o_kernel_w, m_kernel,
                o_rpb_h * rpb_stride_h + o_rpb_w * rpb_stride_w,
                projected_stride_c, projected_stride_k, bias_stride_k, ACCUMULATOR, UPCAST,
            )  # fmt: skip
            b_sum += dot(b_grad, b_weight.to(b_grad.dtype), ACCUMULATOR, UPCAST)
    else:
        o_row_in, o_column_in = o_input_h[None, :], o_input_w[None, :]
        for first_step in range(0, STEPS_H * STEPS_W, BLOCK_STEPS):
            # [S, J]: outputs whose window may hold the input, and where in it
            o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
            o_output_h, o_kernel_h, m_row = inverse_neighbour(
                o_row_in, o_step // STEPS_W, height, height, KERNEL, 1, 0, 1, True
            )
            o_output_w, o_kernel_w, m_column = inverse_neighbour(
                o_column_in, o_step % STEPS_W, width, width, KERNEL, 1, 0, 1, True
            )
            m_step = m_input[None, :] & (o_step < STEPS_H * STEPS_W) & m_row & m_column
            o_kernel = o_kernel_h * KERNEL + o_kernel_w
            o_rpb_h, o_rpb_w = o_row_in - o_output_h + KERNEL - 1, o_column_in - o_output_w + KERNEL - 1
            o_output_h, o_output_w = o_output_h.to(OFFSET), o_output_w.to(OFFSET)
            # [S, Dq, J]
            m_block = m_step[:, None, :] & m_query[None, :, None]
            o_pixel = o_output_h * query_stride_h + o_output_w * query_stride_w
            p_block = p_query + (o_query.to(OFFSET) * query_stride_c)[None, :, None] + o_pixel[:, None, :]
            b_query = tl.load(p_block, mask=m_block, other=0).to(ACCUMULATOR)
            p_block = p_projected + (o_query * projected_stride_c)[None, :, None]
            p_block += (o_kernel * projected_stride_k)[:, None, :]
            b_projected = tl.load(p_block, mask=m_block, other=0).to(ACCUMULATOR)
            # [S, J]
            b_logits = tl.sum(b_query * b_projected, axis=1)
            b_logits += tl.load(bias_ptr + o_kernel * bias_stride_k, mask=m_step, other=0).to(ACCUMULATOR)
            o_rpb = o_rpb_h * rpb_stride_h + o_rpb_w * rpb_stride_w
            b_logits += tl.load(p_rpb + o_rpb, mask=m_step, other=0).to(ACCUMULATOR)
            o_statistics = o_output_h * statistics_stride_h + o_output_w * statistics_stride_w
            b_statistics = tl.load(p_statistics + o_statistics, mask=m_step, other=0)
            b_weight = tl.where(m_step, tl.exp(b_logits - b_statistics), 0.0)
            # [S, C, J]
            o_pixel = o_output_h * grad_stride_h + o_output_w * grad_stride_w
            p_block = p_grad + (o_channel.to(OFFSET) * grad_stride_c)[None, :, None] + o_pixel[:, None, :]
            m_block = m_step[:, None, :] & m_channel[None, :, None]
            b_grad = tl.load(p_block, mask=m_block, other=0).to(ACCUMULATOR)
            b_sum += tl.sum(b_weight[:, None, :] * b_grad, axis=0)

    o_target = o_input_h.to(OFFSET) * target_stride_h + o_input_w.to(OFFSET) * target_stride_w
    tl.store(
        p_target + (o_channel.to(OFFSET) * target_stride_c)[:, None] + o_target[None, :],
        b_sum.to(target_ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_input[None, :],
    )


def reference_gradients(saved: Saved) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The eager gradients of query, projected, bias, rpb and value for one kernel size, for the tuner."""
    grad, query, projected, bias, rpb, value, out, statistics = at_least_float32(*saved)
    sizes = [(rpb.shape[1] + 1) // 2]
    gradients = eager.contmix_backward(
        grad[:, None], query, projected, bias, rpb.flatten(1), value[:, None], out[:, None], statistics[:, None], sizes
    )
    return (*gradients[:3], gradients[3].view(rpb.shape), gradients[4][:, 0])


def grad_query(saved: Saved, target: Tensor, delta: Tensor, config: Config | None = None) -> Tensor:
    """Σ_k ds[n,k] · projected[:,k] for one kernel size: fills ``target`` [B,G,Dq,H,W] and ``delta`` [B,G,H,W]."""
    query, rpb, value = saved.query, saved.rpb, saved.value
    if config is None:
        trial = Trial(lambda config: grad_query(saved, target, delta, config), lambda: reference_gradients(saved)[0])
        config = choose(GRAD_QUERY, problem_of(query, rpb, value), value.device, trial)
    arguments = tensor_arguments(**saved.but(), delta=delta, target=target)
    arguments |= tile_arguments(config, query, rpb, value, saved.grad, saved.out, target)
    # One program per (tile of outputs, window, group, batch entry).
    grid = (arguments["tiles"] * arguments["windows"] * value.shape[1] * value.shape[0],)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_query_kernel, grid, target.device, arguments, **options)
    return target


def grad_value(saved: Saved, target: Tensor, config: Config | None = None) -> Tensor:
    """Σ over (n, k) with nbr(n,k) = j of p[n,k] · grad[n,:], for one kernel size: fills ``target`` [B,G,Dv,H,W]."""
    problem = problem_of(saved.query, saved.rpb, saved.value)
    if config is None:
        trial = Trial(lambda config: grad_value(saved, target, config), lambda: reference_gradients(saved)[4])
        config = choose(GRAD_VALUE, problem, target.device, trial)
    batch, groups, _, height, width = target.shape
    window = Window.neighborhood((problem.kernel_size, problem.kernel_size))
    arguments = tensor_arguments(**saved.but("value", "out"), target=target)
    arguments |= tile_arguments(config, saved.query, saved.rpb, saved.value, saved.grad, target)
    arguments |= {"STEPS_H": inverse_steps(window, height, 0), "STEPS_W": inverse_steps(window, width, 1)}
    # One program per (tile of inputs, group, batch entry).
    inputs = config.block_steps if problem.shared else config.block_pixels
    grid = (ceil_divide(height * width, inputs) * groups * batch,)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_value_kernel, grid, target.device, arguments, **options)
    return target
