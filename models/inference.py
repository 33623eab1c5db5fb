"""Inference forms: what training keeps apart is folded into its neighbours' weights, and the logits stay.

    convolution, then affine    s·(W∗x + b) + t         = (s·W)∗x + (s·b + t)
    affine, then convolution    W∗(s·x + t) + b         = (W·s)∗x + (b + Σ W·t)     where the convolution is not padded
    residual convolution        x + W∗x + b             = (W + δ)∗x + b             δ: 1 at the window's centre
    layer scale and branch      (s·x + t) + (W∗y + b)   = s·x + (W∗y + (b + t))     one multiply-add

Affine, which is to say s·x + t channel by channel, are batch norms with their running statistics, and layer scales.
What these rules do not reach stays: the batch norm after an involution, say, whose kernels are data and no weights.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.layers import (
    ContMix,
    DilatedReparamBlock,
    DropPath,
    LayerScale,
    ResidualDepthwiseConv2d,
)
from models.overlock import DynamicConvBlock, OverLoCK, RepConvBlock
from models.rednet import Bottleneck, RedNet
from models.volo import VOLO

__all__ = ["optimize_for_inference"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def optimize_for_inference(model: Model) -> Model:
    """A copy of a trained model that computes the same with fewer passes over its feature maps.

    Batch norms and layer scales are folded into convolutions, dilated branches are merged, what only training uses is
    left out, and convolution weights lie in channels-last memory as the feature maps of every family do. Class and
    methods are those of the given model. The entries of its state dict are not: load weights before.

    The copy is in evaluation mode and its parameters are frozen (``requires_grad=False``); gradients still reach the
    image. It can be moved to any device or dtype, and is what to hand to ``torch.compile`` or ``torch.export``.

    Args:
        model: an ``OverLoCK``, ``RedNet`` or ``VOLO`` in evaluation mode, which stays as it is. One that has been
            optimised already gives its equal.

    Raises:
        TypeError: any other module; also one of these that is compiled or wrapped.
        ValueError: the model, or a part of it, is in training mode; or its entries are of several floating types.
    """
    if not isinstance(model, OverLoCK | RedNet | VOLO):
        raise TypeError(f"model must be an OverLoCK, a RedNet or a VOLO, got {type(model).__name__}")
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
    optimised.to(torch.promote_types(dtype, torch.float32))  # weights are rounded once, when all is folded
    if isinstance(optimised, OverLoCK):
        optimised.reparam()
    # Residuals first: after that a convolution is a linear map, whatever it was before.
    for rule in (_fold_residual, _fold_neighbours, _fold_bottleneck, _fold_attention_scale, _fold_layer_scales):
        for module in list(optimised.modules()):
            rule(module)
    for module in list(optimised.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, nn.Identity())
    if isinstance(optimised, OverLoCK):
        _fold_context_scales(optimised)
        if optimised.classifiers.pop("aux_head.2", None):
            del optimised.aux_head  # training's second output
    optimised.to(dtype)
    for module in optimised.modules():
        if isinstance(module, nn.Conv2d):  # a weight in another format than the image is copied at every call
            weight = module.weight.contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=False)
    if _refuse_training not in optimised._forward_pre_hooks.values():
        optimised.register_forward_pre_hook(_refuse_training)
    return optimised.eval()


def _refuse_training(model: nn.Module, _inputs: Any) -> None:
    if model.training:
        raise ValueError("model was optimised for inference and cannot run in training mode; call model.eval()")


# ---- the rules for weights


def _fold_after(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """s[o]·(W∗x + b)[o] + t[o] = (s·W)∗x + (s·b + t)."""
    _assign(conv, conv.weight * scale.view(-1, 1, 1, 1), _bias(conv) * scale + shift)


def _fold_before(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """W∗(s[i]·x + t[i]) + b = (W·s)∗x + (b + Σ_{i,k} W[:, i, k]·t[i]); padding would have to read −t/s, not 0."""
    _assign(conv, conv.weight * scale.view(1, -1, 1, 1), _bias(conv) + conv.weight.sum((2, 3)) @ shift)


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _assign(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [C] of a layer that maps x to scale[c]·x + shift[c]; None for every other layer."""
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
        scale = layer.weight * torch.rsqrt(layer.running_var + layer.eps)
        return scale, layer.bias - layer.running_mean * scale
    if isinstance(layer, LayerScale):
        return layer.weight.flatten(), layer.bias
    return None


# ---- where they apply


def _fold_residual(module: nn.Module) -> None:
    """x + W∗x + b = (W + δ)∗x + b: an ordinary convolution, which is the same module but for the sum in its forward."""
    if isinstance(module, ResidualDepthwiseConv2d):
        module.weight[:, :, 1, 1] += 1
        module.__class__ = nn.Conv2d  # pyright: ignore[reportAttributeAccessIssue]


def _fold_neighbours(module: nn.Module) -> None:
    """Of layers in sequence, every affine one goes into the convolution before it, else into the one after it."""
    if not isinstance(module, nn.Sequential):
        return
    for index, layer in enumerate(module):
        affine = _affine(layer)
        before = module[index - 1] if index > 0 else None
        after = module[index + 1] if index + 1 < len(module) else None
        if isinstance(before, DilatedReparamBlock):
            before = before.lk_origin
        if affine is None:
            continue
        if isinstance(before, nn.Conv2d):
            _fold_after(before, *affine)
        elif isinstance(after, nn.Conv2d) and after.padding == (0, 0) and after.groups == 1:
            _fold_before(after, *affine)
        else:
            continue
        module[index] = nn.Identity()


def _fold_bottleneck(module: nn.Module) -> None:
    """RedNet's block names its layers one by one. ``bn2`` follows the involution and stays."""
    if not isinstance(module, Bottleneck):
        return
    for conv, norm in (("conv1", "bn1"), ("conv3", "bn3")):
        affine = _affine(getattr(module, norm))
        if affine is not None:
            _fold_after(getattr(module, conv), *affine)
            setattr(module, norm, nn.Identity())


def _fold_attention_scale(module: nn.Module) -> None:
    """ContMix: (d/G)^−½·(W_k∗c + b) = ((d/G)^−½·W_k)∗c + (d/G)^−½·b."""
    if isinstance(module, ContMix):
        conv = module.weight_key[1]
        assert isinstance(conv, nn.Conv2d)
        scale = conv.weight.new_full((conv.out_channels,), module.scale)
        _fold_after(conv, scale, torch.zeros_like(scale))
        module.scale = 1.0


def _fold_layer_scales(module: nn.Module) -> None:
    """OverLoCK's residual sums ls(x) + branch(x) become one multiply-add each: the branch takes the shift over."""
    if isinstance(module, RepConvBlock) and isinstance(module.ls, LayerScale):
        _move_shift(module.ls, module.proj)
        module.__class__ = InferenceRepConvBlock
    elif isinstance(module, DynamicConvBlock):
        _move_shift(module.ls1, module.proj)
        _move_shift(module.ls2, module.mlp)
        module.__class__ = InferenceDynamicConvBlock


def _move_shift(scale: LayerScale, branch: nn.Sequential) -> None:
    """Layer scale and branch are summed, so the branch may add the shift."""
    _fold_after(_last_convolution(branch), torch.ones_like(scale.bias), scale.bias)
    scale.bias.zero_()


def _last_convolution(layers: nn.Sequential) -> nn.Conv2d:
    return next(layer for layer in reversed(layers) if isinstance(layer, nn.Conv2d))


def _fold_context_scales(model: OverLoCK) -> None:
    """Focus-Net's h = x_scale(h) + h_scale(h_ref) is h + s·h_ref when whatever makes h takes the rest over.

    Nobody else reads that h: it is the context half of the block before, no stage's last, or of the downsampling.
    """
    for first_maker, stage in ((None, model.sub_blocks3), (model.patch_embedx, model.sub_blocks4)):
        blocks: list[Any] = list(stage)
        makers: list[Any] = [first_maker, *blocks]
        for maker, block in zip(makers, blocks, strict=False):
            affine = None if block.x_scale is None else _affine(block.x_scale)
            if affine is None:
                continue
            scale, shift = affine[0], affine[1] + block.h_scale.bias
            if isinstance(maker, DynamicConvBlock):  # h is ls2(x) + mlp(x), from channel d on
                scale = torch.cat((scale.new_ones(maker.channels), scale))
                shift = torch.cat((shift.new_zeros(maker.channels), shift))
                maker.ls2.weight.mul_(scale.view(-1, 1, 1, 1))
                conv = _last_convolution(maker.mlp)
            else:
                conv = _last_convolution(maker.h_proj)
            _fold_after(conv, scale, shift)
            block.x_scale = nn.Identity()
            block.h_scale.bias.zero_()


def _plus_scaled(branch: Tensor, x: Tensor, scale: LayerScale) -> Tensor:
    """branch + s·x, in place: ``branch`` is a convolution's fresh output."""
    return branch.addcmul_(x, scale.weight.to(x.dtype).view(-1, 1, 1))


class InferenceRepConvBlock(RepConvBlock):
    """``RepConvBlock`` whose layer scale has no shift."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        assert isinstance(self.ls, LayerScale)
        return _plus_scaled(self.proj(x), x, self.ls)


class InferenceDynamicConvBlock(DynamicConvBlock):
    """``DynamicConvBlock`` whose layer scales have no shifts, and h no scale."""

    def forward(self, x: Tensor, h: Tensor, h_reference: Tensor) -> Tensor:
        if self.h_scale is not None:
            h = torch.addcmul(h, h_reference, self.h_scale.weight.to(h.dtype).view(-1, 1, 1))
        residual = self.dwconv1(torch.cat((x, h), 1))
        features = self.norm1(residual)
        x = self.fusion(features)
        mixed = self.dyconv_proj(ContMix.forward(self, x, features)) + self.lepe(x)
        x = _plus_scaled(self.proj(self.se_layer(mixed) * self.gate(x)), residual, self.ls1)
        x = self.dwconv2(x)
        return _plus_scaled(self.mlp(self.norm2(x)), x, self.ls2)
