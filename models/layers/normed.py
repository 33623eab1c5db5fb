"""A batch norm and the GELU after it, in training that PyTorch compiles."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backend import exporting
from models.layers.basic import GELU2d
from models.layers.fusion import as_built, trains
from models.layers.pointwise import in_16_bits_on_gpu, runs_triton


def normed_gelu(norm: nn.Module, x: Tensor) -> Tensor | None:
    """GELU(norm(x)) in compiled training on a GPU in 16 bits; elsewhere None.

    Its backward pass has kernels. In Inductor's, the batch norm's output is written again, in float32.
    """
    if not torch.compiler.is_compiling() or exporting():
        return None
    if not in_16_bits_on_gpu(x) or x.dim() != 4 or not runs_triton(x):
        return None
    statistics = _statistics(norm, x)
    return None if statistics is None else _NormedGELU.apply(x, norm.weight, norm.bias, *statistics)


class NormedSequential(nn.Sequential):
    """Layers in sequence. A batch norm and the GELU after it are one step where ``normed_gelu`` is."""

    def forward(self, input: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        while layers:
            layer, out = layers.pop(0), None
            if layers and as_built(layers[0], GELU2d) and layers[0].approximate == "none":
                out = normed_gelu(layer, input)
            if out is None:
                input = layer(input)
            else:
                input, _ = out, layers.pop(0)
        return input

    def folded(self) -> nn.Module:
        """Inference has no batch norms in training."""
        return nn.Sequential(OrderedDict(self.named_children())).eval() if as_built(self, NormedSequential) else self


def _statistics(norm: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / deviation [C] of x, which renew the running ones of a batch norm in training, as built; or None."""
    if not trains(norm, x.device) or x.numel() <= x.shape[1]:
        return None
    number = x.numel() // x.shape[1]
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (number / (number - 1)))):
            running.lerp_(batch.to(running.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)
        return mean, torch.rsqrt(variance + norm.eps)


class _NormedGELU(torch.autograd.Function):
    """GELU(weight·(x − mean)·rstd + bias), where mean and rstd are those of x, and differentiated as such."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        scale = weight.to(rstd.dtype) * rstd
        shift = bias.to(rstd.dtype) - mean * scale
        ctx.save_for_backward(x, weight, scale, shift, mean, rstd)
        return F.gelu(x.to(rstd.dtype) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from kernels.normed import normed_gelu_backward

        x, weight, scale, shift, mean, rstd = ctx.saved_tensors
        grad, x = (each.contiguous(memory_format=torch.channels_last) for each in (grads[0].to(x.dtype), x))
        return *normed_gelu_backward(grad, x, weight, scale, shift, mean, rstd), None, None
