"""What a parent may fuse of its children, and what inference folds."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from models.layers.pointwise import PaddedConv2d, PointwiseConv2d

# The last two stand for plain tensors while PyTorch traces a model.
PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
CONVOLUTIONS = (nn.Conv2d, PaddedConv2d, PointwiseConv2d)


def as_built(module: Any, kinds: type | tuple[type, ...], device: torch.device | None = None) -> bool:
    """Whether calling ``module`` would compute what a class of ``kinds`` computes with its parameters as they stand.

    Only then may a parent read the parameters and compute the same in fewer steps. It is False for a wrapper or a
    subclass (LoRA, quantisation, FSDP), a parametrisation, hooks (``weight_norm``, ``prune``, offloading), a replaced
    ``forward``, and parameters that are not plain tensors on ``device`` (None: on any). Hooks that are registered for
    all modules of the process do not matter: they see calls, and a fused child is not called.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(module) not in kinds or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and (type(tensor) not in PLAIN or device not in (None, tensor.device)):
            return False
    return True


def convolves(
    module: Any,
    kernel_size: int,
    device: torch.device | None = None,
    *,
    kinds: type | tuple[type, ...] = CONVOLUTIONS,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> bool:
    """Whether ``module`` is, ``as_built``, a convolution with "same" zero padding and these options.

    One that took the ReLU behind it in inference is not.
    """
    padding = dilation * (kernel_size // 2)
    return (as_built(module, kinds, device) and not getattr(module, "relu", False)) and (
        (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
        == ((kernel_size,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups, "zeros")
    )


def trains(norm: Any, device: torch.device) -> bool:
    """Whether ``norm`` is, as built, a batch norm in training, with weights and a fixed momentum of its statistics."""
    if not as_built(norm, nn.BatchNorm2d, device) or not norm.training or not norm.affine:
        return False
    return norm.running_mean is not None and norm.momentum is not None


def fold_after(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """s[o]·(W∗x + b)[o] + t[o] = (s·W)∗x + (s·b + t), in the convolution's own parameters."""
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)


def fold_before(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """W∗(s[i]·x + t[i]) + b = (W·s)∗x + (b + Σ_{i,k} W[:, i, k]·t[i]); padding would have to read −t/s, not 0."""
    moved = conv.weight.sum((2, 3)) @ shift
    conv.bias = nn.Parameter(moved if conv.bias is None else conv.bias + moved, requires_grad=False)
    conv.weight = nn.Parameter(conv.weight * scale.view(1, -1, 1, 1), requires_grad=False)


def move_bias(source: Any, target: Any) -> None:
    """Lets ``target`` add the bias of ``source``, if there are both: their outputs are summed."""
    if source is not None and target is not None and source.bias is not None:
        bias = source.bias if target.bias is None else target.bias + source.bias
        source.bias, target.bias = None, nn.Parameter(bias, requires_grad=False)


def last_convolution(layers: nn.Module, *kinds: type[nn.Sequential]) -> nn.Conv2d | None:
    """The last layer in sequence apart from identities, if it is a convolution that may be folded into; else None."""
    if not as_built(layers, (nn.Sequential, *kinds)):
        return None
    last: Any = [layer for layer in layers.children() if not isinstance(layer, nn.Identity)][-1]
    return last if as_built(last, CONVOLUTIONS) and not getattr(last, "relu", False) else None
