"""Outlook attention: every window's values mixed by weights computed from its centre, overlapping windows summed."""

import math
import numbers

from torch import Tensor

from kernels import reference
from kernels.backend import get_backend, resolve
from kernels.checks import as_int, check_shapes, check_tensors
from kernels.registration import operator, without_autocast


def outlook_attention2d(
    logits: Tensor,
    value: Tensor,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """p[w,t,s] = softmax_s(scale · logits[w,t,s]);  out[i] = Σ_{(w,t): pixel(w,t)=i} Σ_s p[w,t,s] · value[pixel(w,s)]

    Window w = (a, b) has its position (k, l) at pixel (a·stride − padding + k, b·stride − padding + l); t and s count
    positions row by row. Positions outside the image are zero values that keep their share of the softmax. A pixel sums
    the results of all windows that hold it.

    dvalue[j] = Σ_{(w,s): pixel(w,s)=j} Σ_t p[w,t,s] · dout[pixel(w,t)];  dlogits = scale · p · (dp − Σ_s p·dp) with
    dp[w,t,s] = Σ_c dout[pixel(w,t),c] · value[pixel(w,s),c], per head.

    Args:
        logits: [B, h, w, heads, K², K²] (target, source), h = ceil(H / stride), w = ceil(W / stride).
        value: [B, H, W, C], C a multiple of heads; head n has channels n·C/heads and on.
        kernel_size: K, the side of a window in pixels.
        stride: pixels between windows.
        padding: rows and columns that the first windows reach over the border.
        scale: factor of the logits, a finite number.

    Returns:
        [B, H, W, C], contiguous. The softmax runs in float32 (float64 for float64 logits). Differentiable once.
        A value reaches only the outputs of the windows that hold its pixel, in its own channel.

    Raises:
        TypeError: a tensor is not a floating tensor, the dtypes differ, or an option is not a number of its kind.
        ValueError: shapes, devices or options do not fit together.

    Source: arXiv 2106.13112, equations 3-5.
    """
    logits, value = check_tensors(logits=logits, value=value)
    kernel_size, stride, padding = (
        as_int(name, option, minimum)
        for name, option, minimum in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0))
    )
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be a real number, got {scale!r}")
    if not -math.inf < scale < math.inf:  # isfinite, which does not trace with a symbolic scale
        raise ValueError(f"scale must be finite, got {scale!r}")
    sizes = check_shapes(value=(value, "B H W C"))
    height, width, channels = value.shape[1:]
    sizes |= {"h": -(-height // stride), "w": -(-width // stride), "targets": kernel_size**2, "sources": kernel_size**2}
    check_shapes(sizes, logits=(logits, "B h w heads targets sources"))
    heads = logits.shape[3]
    if channels % heads:
        raise ValueError(f"logits have {heads} heads, which must divide the {channels} channels of value")
    if stride > height and stride > width:  # a single window: so that a kernel's steps do not grow with the stride
        stride = max(height, width)
    scale = float(scale)
    backend = get_backend()
    if backend == "reference":
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "scale": scale}
        return without_autocast(reference.outlook_attention2d, logits, value, **options)
    return _outlook(logits, value, kernel_size, stride, padding, scale, backend)


WINDOWS = "int kernel_size, int stride, int padding, float scale, str backend"


def _flops(logits, value, *_) -> int:
    """Every entry [B, h, w, heads, K², K²] meets the channels of its head."""
    return 2 * math.prod(logits) * value[3] // logits[3]


@operator(
    "outlook",
    f"(Tensor logits, Tensor value, {WINDOWS}) -> Tensor",
    fake=lambda _logits, value, *_: value.new_empty(value.shape),
    flops=_flops,
)
def _outlook(logits, value, kernel_size, stride, padding, scale, backend):
    if resolve(backend, value[..., 0]) == "triton":
        from kernels.outlook.forward import outlook
    else:
        from kernels.outlook.eager import outlook
    return outlook(logits, value, kernel_size, stride, padding, scale)


@operator(
    "outlook_backward",
    f"(Tensor grad, Tensor logits, Tensor value, {WINDOWS}) -> (Tensor, Tensor)",
    fake=lambda _grad, logits, value, *_: (logits.new_empty(logits.shape), value.new_empty(value.shape)),
    flops=lambda _grad, *forward: 2 * _flops(*forward),
)
def _outlook_backward(grad, logits, value, kernel_size, stride, padding, scale, backend):
    """Gradients of logits and value, contiguous."""
    if resolve(backend, value[..., 0]) == "triton":
        from kernels.outlook.backward import outlook_backward
    else:
        from kernels.outlook.eager import outlook_backward
    return outlook_backward(grad, logits, value, kernel_size, stride, padding, scale)


_outlook.differentiable_once(_outlook_backward, "outlook_attention2d")
