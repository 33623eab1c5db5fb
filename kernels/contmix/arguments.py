"""What ContMix's launchers share: the tensors of one kernel size, what kernels take of them, what must come out."""

from typing import Any, NamedTuple

from torch import Tensor

from kernels.contmix import eager
from kernels.contmix.configs import Problem, block
from kernels.dtypes import precision, upcast
from kernels.launch import launch
from kernels.views import View, view

AXES = {
    "query": "b g c h w",
    "projected": "b g c k",
    "bias": "k",
    "rpb": "g h w",
    "value": "b g c h w",
    "out": "b g c h w",
    "statistics": "b g h w",
    "grad": "b g c h w",
}


class Tensors(NamedTuple):
    """Those of one kernel size. The forward pass fills ``out`` and ``statistics``, the backward pass reads all."""

    query: Tensor  # [B, G, Dq, H, W]
    projected: Tensor  # [B, G, Dq, K²], in the accumulator's type
    bias: Tensor  # [K²]
    rpb: Tensor  # [G, 2K-1, 2K-1]
    value: Tensor  # [B, G, Dv, H, W]
    out: Tensor  # [B, G, Dv, H, W]
    statistics: Tensor  # [B, G, H, W]: log Σ_k exp
    grad: Tensor | None = None  # [B, G, Dv, H, W]

    @property
    def kernel_size(self) -> int:
        return (self.rpb.shape[1] + 1) // 2

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        batch, groups, _, height, width = self.value.shape
        return batch, groups, height, width


class Targets(NamedTuple):
    """The gradients that a kernel size's backward pass writes, and the gradient of query that it adds to."""

    query: Tensor  # [B, G, Dq, H, W]
    value: Tensor  # [B, G, Dv, H, W]
    projected: Tensor  # [B, G, Dq, K²], in memory K², B, G, Dq
    bias: Tensor  # [K²]
    rpb: Tensor  # [G, 2K-1, 2K-1]
    previous: Tensor | None


def problem_of(tensors: Tensors, *_: Any) -> Problem:
    batch, groups, channels, height, width = tensors.value.shape
    pixels, windows = height * width, (height - tensors.kernel_size + 1) * (width - tensors.kernel_size + 1)
    query_channels, outputs = tensors.query.shape[2], pixels // max(1, windows)
    return Problem(batch, groups, channels, query_channels, pixels, tensors.kernel_size, tensors.value.dtype, outputs)


def launch_on(
    tensors: Tensors,
    kernel: Any,
    programs: int,
    /,
    *,
    num_warps: int,
    num_stages: int,
    most_registers: int = 0,
    **arguments: Any,
) -> None:
    """Launches a kernel with ``arguments``, with views of those ``tensors`` that it names, and with what it names of
    the constants below. A thread gets ``most_registers`` if any."""
    views = {name: view(tensor, AXES[name]) for name, tensor in tensors._asdict().items() if tensor is not None}
    query_channels, dtype = tensors.query.shape[2], tensors.value.dtype
    known = {
        **views,
        "sizes": tensors.sizes,
        "KERNEL": tensors.kernel_size,
        "QUERY_CHANNELS": query_channels,
        "CHANNELS": tensors.value.shape[2],
        "BLOCK_QUERY": block(query_channels),
        "UPCAST": upcast(dtype),
        **precision(tensors.value, *(each.ptr for each in (views | arguments).values() if isinstance(each, View))),
    }
    named = {name: value for name, value in known.items() if name in kernel.arg_names}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if most_registers:
        options["maxnreg"] = most_registers
    launch(kernel, (programs,), tensors.value.device, named | arguments, **options)


def adding(targets: Targets) -> dict[str, Any]:
    """The arguments of a kernel that writes query's gradient, and adds to it what came before it, if anything did."""
    target, previous = targets.query, targets.previous
    return {
        "previous": view(target if previous is None else previous, "b g c h w"),
        "grad_query": view(target, "b g c h w"),
        "ADD": previous is not None,
    }


def reference_forward(tensors: Tensors) -> Tensor:
    """What the forward pass of one kernel size must return."""
    query, projected, bias, rpb, value, *_ = tensors
    return eager.contmix(query, projected, bias, [rpb], value[:, None], [tensors.kernel_size])[0][:, 0]


def reference_gradients(tensors: Tensors, targets: Targets) -> tuple[Tensor, ...]:
    """Gradients of query, added to a previous one, of value, projected, bias and rpb."""
    query, projected, bias, rpb, value, out, statistics, grad = tensors
    assert grad is not None
    inputs = query, projected, bias, [rpb], value[:, None]
    found = eager.contmix_backward(grad[:, None], *inputs, out[:, None], statistics[:, None], [tensors.kernel_size])
    grad_query, grad_projected, grad_bias, [grad_rpb], grad_value = found
    grad_query = grad_query if targets.previous is None else grad_query + targets.previous
    return grad_query, grad_value[:, 0], grad_projected, grad_bias, grad_rpb
