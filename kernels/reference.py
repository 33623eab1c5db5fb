"""Every operator as a short plain-PyTorch definition: the oracle of all tests, and the naive path of all benchmarks.

These follow the formulas line by line, in whatever dtype they are given, and are differentiated by PyTorch itself.
They are also what people run where no kernel can be installed: unfold (or gather) every neighbourhood, multiply, sum,
at K*K times the memory of the input. They check nothing; the public functions of ``kernels`` do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.windows import Pair, Window


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def involution2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
) -> Tensor:
    """out[b,c,i] = Σ_k weight[b, c // (C/G), k, i] · x[b, c, i·s − p + k·d]  (arXiv 2103.06255, eq. 4)."""
    batch, groups, kernel_h, kernel_w, height, width = weight.shape
    dilation = _pair(dilation)
    if padding is None:
        padding = ((kernel_h - 1) * dilation[0] // 2, (kernel_w - 1) * dilation[1] // 2)
    unfolded = F.unfold(x, (kernel_h, kernel_w), dilation, _pair(padding), _pair(stride))
    unfolded = unfolded.view(batch, groups, x.shape[1] // groups, kernel_h * kernel_w, height, width)
    return (weight.flatten(2, 3).unsqueeze(2) * unfolded).sum(3).flatten(1, 2)


def involution2d_generate(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Pair,
    groups: int,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
) -> Tensor:
    """involution2d with kernel[b, g·K² + k, i] = Σ_r weight[g·K² + k, r] · features[b,r,i] + bias[g·K² + k]."""
    kernel = F.conv2d(features, weight[:, :, None, None], bias).unflatten(1, (groups, *_pair(kernel_size)))
    return involution2d(x, kernel, stride=stride, padding=padding, dilation=dilation)


def _summable(tensor: Tensor) -> Tensor:
    """Where a gradient is wanted, at least float32: the sums that are an index's gradient run in its tensor's dtype."""
    return tensor.to(accumulator_dtype(tensor.dtype)) if tensor.requires_grad else tensor


def gather_neighbourhoods(tensor: Tensor, window: Window) -> Tensor:
    """[B, heads, H, W, D] -> [B, heads, H, W, K², D]."""
    rows = window.neighbours(tensor.shape[2], 0, tensor.device)[:, None, :, None]
    columns = window.neighbours(tensor.shape[3], 1, tensor.device)[None, :, None, :]
    return _summable(tensor)[:, :, rows, columns].flatten(4, 5).to(tensor.dtype)


def rpb_logits(rpb: Tensor, height: int, width: int, window: Window) -> Tensor:
    """rpb[head, (neighbour − query)/dilation + K − 1 per axis] at every (query, neighbour): [heads, H, W, K²]."""
    rows, columns = window.relative(height, 0, rpb.device), window.relative(width, 1, rpb.device)
    return _summable(rpb)[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4).to(rpb.dtype)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int | Pair, dilation: int | Pair = 1) -> Tensor:
    """out[b,h,i] = Σ_k attn[b,h,i,k] · value[b,h,nbr(i,k)], clamped windows  (arXiv 2204.07143, eq. 3)."""
    window = Window.neighborhood(_pair(kernel_size), _pair(dilation))
    return torch.einsum("bhijk,bhijkd->bhijd", attn, gather_neighbourhoods(value, window))


def na2d_qk(
    query: Tensor, key: Tensor, kernel_size: int | Pair, dilation: int | Pair = 1, rpb: Tensor | None = None
) -> Tensor:
    """out[b,h,i,k] = Σ_c query[b,h,i,c] · key[b,h,nbr(i,k),c] (+ rpb[h, (nbr(i,k) − i)/d + K − 1])
    (arXiv 2204.07143, eq. 2)."""
    window = Window.neighborhood(_pair(kernel_size), _pair(dilation))
    logits = torch.einsum("bhijd,bhijkd->bhijk", query, gather_neighbourhoods(key, window))
    return logits if rpb is None else logits + rpb_logits(rpb, query.shape[2], query.shape[3], window)


def na2d_softmax_av(
    logits: Tensor, value: Tensor, kernel_size: int | Pair, *, rpb: Tensor | None = None, dilation: int | Pair = 1
) -> Tensor:
    """out[b,h,i] = Σ_k softmax_k(logits[b,h,i,k] + rpb[h, (nbr(i,k) − i)/d + K − 1]) · value[b,h,nbr(i,k)]."""
    if rpb is not None:
        window = Window.neighborhood(_pair(kernel_size), _pair(dilation))
        logits = logits + rpb_logits(rpb, logits.shape[2], logits.shape[3], window)
    return na2d_av(logits.softmax(-1), value, kernel_size, dilation)


def contmix2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rpb: tuple[Tensor, ...] | list[Tensor],
    *,
    kernel_sizes: tuple[int, ...],
) -> Tensor:
    """affinity = queryᵀ·key;  logits = proj·affinity + bias, cut by kernel size;
    out_m = na2d_softmax_av(logits_m + rpb_m, value_m)
    (arXiv 2502.20087, eq. 1-3)."""
    affinity = torch.einsum("bgchw,bgcl->bghwl", query, key)
    logits = F.linear(affinity, proj_weight, proj_bias).split([k * k for k in kernel_sizes], -1)
    mixed = [
        na2d_softmax_av(logits[m], value[:, m].permute(0, 1, 3, 4, 2), k, rpb=rpb[m]).permute(0, 1, 4, 2, 3)
        for m, k in enumerate(kernel_sizes)
    ]
    return torch.stack(mixed, 1)


def outlook_attention2d(
    logits: Tensor,
    value: Tensor,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """Each window's K² values mixed by softmax(scale·logits) over its sources, then overlapping windows summed
    (arXiv 2106.13112, eq. 3-5)."""
    batch, height, width, channels = value.shape
    windows_h, windows_w, heads = logits.shape[1:4]
    span_h, span_w = (windows_h - 1) * stride + kernel_size, (windows_w - 1) * stride + kernel_size
    # The exporter that traces knows fold with constant sizes only.
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        span_h, span_w = int(span_h), int(span_w)
    # Zeros around the image, then what the windows span of it; windows may lie beyond the image, and it beyond them.
    padded = F.pad(value.permute(0, 3, 1, 2), (padding, kernel_size) * 2)[..., :span_h, :span_w]
    unfolded = F.unfold(padded, kernel_size, stride=stride)
    unfolded = unfolded.view(batch, heads, channels // heads, kernel_size**2, windows_h * windows_w)
    attn = (logits * scale).softmax(-1).flatten(1, 2)
    mixed = torch.einsum("bnhts,bhcsn->bhctn", attn, unfolded).flatten(1, 3)
    folded = F.pad(F.fold(mixed, (span_h, span_w), kernel_size, stride=stride), (0, padding + stride) * 2)
    return folded[..., padding : padding + height, padding : padding + width].permute(0, 2, 3, 1)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c,i − K//2 + k] + bias[c], zero "same" padding."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
