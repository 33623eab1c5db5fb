"""Folds batch norms, layer scales and residuals into convolutions for inference; outputs stay equal up to rounding.

    convolution, then affine    s·(W∗x + b) + t         = (s·W)∗x + (s·b + t)
    affine, then convolution    W∗(s·x + t) + b         = (W·s)∗x + (b + Σ W·t)     where the convolution is not padded
    residual convolution        x + W∗x + b             = (W + δ)∗x + b             δ: 1 at the window's centre
    layer scale and branch      (s·x + t) + (W∗y + b)   = s·x + (W∗y + (b + t))     one multiply-add

Affine layers compute s·x + t per channel: batch norms with running statistics, and layer scales. Blocks and families
say what they become by a method ``folded``; this module has the order, and the rule for layers in sequence. Some
layers stay: the batch norm after an involution, whose kernels depend on its input, and layers that were replaced,
wrapped or hooked. Layers are joined, too, that a GPU can run in fewer passes: at the end of RedNet's blocks
(``layers.rednet_inference``), ReLU with the convolution before it, and in bfloat16 GELU with VOLO's products.
"""

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import nn

from models._contract import BackboneContract
from models.layers import DepthwiseConv2d, GlobalResponseNorm, PointwiseConv2d
from models.layers.basic import affine
from models.layers.fusion import CONVOLUTIONS, as_built, convolves, fold_after, fold_before
from models.layers.pointwise import PaddedConv2d

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def optimize_for_inference(model: Model) -> Model:
    """Returns a copy of a trained model that computes the same with fewer passes over its feature maps.

    Batch norms and layer scales are folded into convolutions, dilated branches are merged, what only training uses is
    left out, and the weights of convolutions lie in channels-last memory, as feature maps do. The copy has the class
    and the methods of the given model, but other state-dict entries: load weights before.

    The copy is in evaluation mode and its parameters are frozen (``requires_grad=False``); gradients still reach the
    image. It can be moved to any device or dtype; give this copy to ``torch.compile`` or ``torch.export``.

    Args:
        model: an ``OverLoCK``, ``RedNet`` or ``VOLO`` in evaluation mode, which is not changed. An optimised model
            gives an equal copy.

    Raises:
        TypeError: any other module; also one of these that is compiled or wrapped.
        ValueError: the model, or a part of it, is in training mode; or its entries are of several floating types.
    """
    if not isinstance(model, BackboneContract):
        raise TypeError(f"model must be one that models.create_model builds, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model must be in evaluation mode, but its {name or 'root'} is in training mode; call model.eval()"
            )
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"model must have entries of one floating type, got {', '.join(sorted(map(str, dtypes)))}")
    (dtype,) = dtypes

    optimised = copy.deepcopy(model).requires_grad_(False)
    optimised.zero_grad(set_to_none=True)
    optimised.set_grad_checkpointing(False)
    optimised.to(torch.promote_types(dtype, torch.float32))  # so that weights are rounded once, after folding
    _fold(optimised)
    optimised.to(dtype)
    for module in optimised.modules():
        # A weight in another memory format than the image would be copied at every call.
        if isinstance(module, nn.Conv2d) and "weight" in module._parameters:
            weight = module.weight.contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=False)
    if _refuse_training not in optimised._forward_pre_hooks.values():
        optimised.register_forward_pre_hook(_refuse_training)
    return optimised.eval()


def _refuse_training(model: nn.Module, _inputs: Any) -> None:
    if model.training:
        raise ValueError("model was optimised for inference and cannot run in training mode; call model.eval()")


def _fold(module: nn.Module) -> nn.Module:
    """The folded form of ``module``. Children are folded first, so that their parent finds plain convolutions.

    What a module becomes is folded in turn.
    """
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    if isinstance(module, nn.Sequential):
        fold_sequence(module)
    folded: Any = getattr(module, "folded", lambda: module)()
    return module if folded is module else _fold(folded)


def fold_sequence(layers: nn.Sequential) -> None:
    """Folds every affine layer into the convolution before it, or else into the one after it.

    The latter takes a response norm's shift, too. Then 1×1 convolutions, which may be matrix products, and those of
    images take the ReLU that follows them.
    """
    layer: Any
    for index, layer in enumerate(layers):
        before: Any = layers[index - 1] if index > 0 else None
        after: Any = layers[index + 1] if index + 1 < len(layers) else None
        if as_built(layer, GlobalResponseNorm) and layer.beta is not None and convolves(after, 1):
            fold_before(after, torch.ones_like(layer.beta).flatten(), layer.beta.flatten())
            layer.beta = None
        scale_and_shift = affine(layer)
        if scale_and_shift is None:
            continue
        if as_built(before, (*CONVOLUTIONS, DepthwiseConv2d)):
            fold_after(before, *scale_and_shift)
        elif convolves(after, 1):
            fold_before(after, *scale_and_shift)
        else:
            continue
        layers[index] = nn.Identity()
    left = [(index, layer) for index, layer in enumerate(layers) if not isinstance(layer, nn.Identity)]
    for (_, layer), (index, relu) in itertools.pairwise(left):
        if as_built(layer, (PointwiseConv2d, PaddedConv2d)) and as_built(relu, nn.ReLU):
            layer.relu = True
            layers[index] = nn.Identity()
