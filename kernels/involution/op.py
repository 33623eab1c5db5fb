"""Involution: a convolution whose kernel belongs to the pixel and is shared by the channels of a group."""

from __future__ import annotations

from torch import Tensor

from kernels import reference
from kernels.aggregation.op import aggregate
from kernels.backend import get_backend
from kernels.checks import as_pair, check_shape, check_tensors
from kernels.windows import Pair, Window

__all__ = ["involution2d"]


def involution2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
) -> Tensor:
    """out[b,c,i] = Σ_k weight[b, c // (C/G), k, i] · x[b, c, i·stride − padding + k·dilation]

    dx[b,c,j] = Σ_{(i,k) reaching j} weight[b,g,k,i] · dout[b,c,i];  dweight[b,g,k,i] = Σ_{c in g} dout[b,c,i] · x[b,c,nbr(i,k)].

    Args:
        x: features [B, C, H, W]; positions outside it read 0.
        weight: dynamic kernels [B, G, Kh, Kw, H', W'], one per output pixel and group of C/G contiguous channels.
        stride: pixels between output positions; an int, or (rows, columns) here and below.
        padding: zeros before and after each axis; None means (K − 1)·dilation // 2.
        dilation: pixels between window positions.

    Returns:
        [B, C, H', W'] in the memory format of x, H' = (H + 2·padding − dilation·(K − 1) − 1) // stride + 1.

    Raises:
        TypeError: an argument is no floating tensor, the dtypes differ, or an option is not an int or pair of ints.
        ValueError: shapes, devices or options do not fit together.

    Source: arXiv 2103.06255, equation 4. Differentiable any number of times.
    """
    x, weight = check_tensors(x=x, weight=weight)
    strides, dilations = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
    check_shape("x", x, "B C H W")
    check_shape("weight", weight, "B G Kh Kw H' W'", B=x.shape[0])
    channels, groups, kernel_size = x.shape[1], weight.shape[1], (weight.shape[2], weight.shape[3])
    if channels % groups:
        raise ValueError(f"weight has {groups} groups, which must divide the {channels} channels of x")
    if padding is None:
        paddings = ((kernel_size[0] - 1) * dilations[0] // 2, (kernel_size[1] - 1) * dilations[1] // 2)
    else:
        paddings = as_pair("padding", padding, 0)
    window = Window(kernel_size, strides, paddings, dilations)
    height, width = window.output_size(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(
            f"weight's window {kernel_size} (dilation {dilation}, padding {paddings}) does not fit x of size "
            f"{tuple(x.shape[2:])}: the output would be {height}x{width}"
        )
    check_shape("weight", weight, "B G Kh Kw H' W'", **{"H'": height, "W'": width})
    backend = get_backend()
    if backend == "reference":
        return reference.involution2d(x, weight, stride=strides, padding=paddings, dilation=dilations)
    return aggregate(weight, x.unflatten(1, (groups, channels // groups)), window, backend).flatten(1, 2)
