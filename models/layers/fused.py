"""What inference runs in one kernel on a GPU: 3×3 depthwise convolutions, alone and inside of feed-forward parts, and
1×1 convolutions with the ReLU after them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import get_backend, resolve
from models.layers.basic import GELU2d, GlobalResponseNorm
from models.layers.depthwise import DepthwiseConv2d
from models.layers.fusion import CONVOLUTIONS, as_built, convolves, fold_before
from models.layers.pointwise import PointwiseConv2d
from models.layers.tracing import leaf


def is_depthwise(module: Any) -> bool:
    """Whether ``module`` is a plain 3×3 depthwise convolution with a bias."""
    groups = getattr(module, "in_channels", 0)
    kinds = (*CONVOLUTIONS, DepthwiseConv2d)
    return (
        convolves(module, 3, kinds=kinds, groups=groups) and module.out_channels == groups and module.bias is not None
    )


def _runs_fused(conv: Any, x: Tensor, layers: Iterable[nn.Module]) -> bool:
    """Whether the kernel computes ``conv`` of x: in 16 bits on a GPU, without gradients, all ``layers`` as built."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not all(as_built(layer, KINDS, x.device) for layer in layers):
        return False
    if resolve(get_backend(), x) != "triton" or torch.is_autocast_enabled(x.device.type):
        return False
    from kernels.depthwise.fused import fits

    return x.dtype == conv.weight.dtype and fits(x) and not (torch.is_grad_enabled() and x.requires_grad)


class FusedDepthwiseConv2d(nn.Conv2d):
    """A 3×3 depthwise convolution, whose bias takes no second pass over the output."""

    def __init__(self, conv: nn.Conv2d) -> None:
        channels = conv.in_channels
        super().__init__(channels, channels, 3, padding=1, groups=channels, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if not _runs_fused(self, input, [self]):
            return super().forward(input)
        from kernels.depthwise.fused import fused_depthwise_conv2d

        bias: Any = self.bias
        return fused_depthwise_conv2d(input, self.weight, bias, False, False)[0]


KINDS = (*CONVOLUTIONS, DepthwiseConv2d, FusedDepthwiseConv2d, GELU2d, GlobalResponseNorm)


class FusedFeedForward(nn.Sequential):
    """project(norm(conv(GELU(x)))) with a 3×3 depthwise ``conv``; the norm's shift becomes a part of the projection's.

    The kernel takes GELU on its way in, and the norm's sums of squares on its way out. Where an image has more pixels
    than the projection has outputs, the norm scales the projection's weights instead of the map.
    """

    def __init__(self, conv: nn.Conv2d, norm: GlobalResponseNorm, project: nn.Conv2d) -> None:
        fold_before(project, torch.ones_like(norm.beta).flatten(), norm.beta.flatten())
        norm.beta = nn.Parameter(torch.zeros_like(norm.beta), requires_grad=False)
        super().__init__(GELU2d(), conv, norm, project)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        conv: Any
        norm: Any
        project: Any
        _, conv, norm, project = self
        if not _runs_fused(conv, input, self):
            return super().forward(input)
        from kernels.depthwise.fused import fused_depthwise_conv2d

        x, squares = fused_depthwise_conv2d(input, conv.weight, conv.bias, True, True)
        scale = norm.scale(squares.sqrt()[:, :, None, None])
        if project.out_channels >= x.shape[2] * x.shape[3]:
            return project(x * scale.to(x.dtype))
        weight = (project.weight.flatten(1) * scale.flatten(2).transpose(1, 2)).to(x.dtype)  # [B, out, C]
        out = x.permute(0, 2, 3, 1).flatten(1, 2) @ weight.transpose(1, 2) + project.bias
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def fuse(module: nn.Module) -> None:
    """Replaces, inside of ``module``, what has a fused form, in place."""
    children: list[tuple[str, Any]] = list(module.named_children())
    layers = [(name, child) for name, child in children if not isinstance(child, nn.Identity)]
    for (_, conv), (name, relu) in itertools.pairwise(layers if as_built(module, nn.Sequential) else []):
        if as_built(conv, PointwiseConv2d) and as_built(relu, nn.ReLU):
            conv.relu = True
            setattr(module, name, nn.Identity())
    for start in range(len(children) - 3 if as_built(module, nn.Sequential) else 0):
        names, (gelu, conv, norm, project) = zip(*children[start : start + 4], strict=True)
        exact = as_built(gelu, GELU2d) and gelu.approximate == "none"
        if exact and is_depthwise(conv) and as_built(norm, GlobalResponseNorm) and convolves(project, 1):
            setattr(module, names[0], FusedFeedForward(conv, norm, project))
            for name in names[1:]:
                setattr(module, name, nn.Identity())
    children = list(module.named_children())
    for name, child in children:
        if is_depthwise(child):
            setattr(module, name, FusedDepthwiseConv2d(child))
        elif not isinstance(child, FusedFeedForward):
            fuse(child)
