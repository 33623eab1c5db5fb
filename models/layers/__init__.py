"""Layers from which the families are built, for networks of your own as well.

Three of them compute kernels from their input, by the operators of ``kernels``:

====================  ===============================================================  ==============
layer                 call                                                             source
====================  ===============================================================  ==============
``Involution2d``      x [B, C, H, W] -> [B, C, ⌈H/stride⌉, ⌈W/stride⌉]                 RedNet
``ContMix``           x [B, d, H, W], features [B, d + c, H, W] -> [B, d, H, W]        OverLoCK
``OutlookAttention``  x [B, H, W, C] -> [B, H, W, C]                                   VOLO
====================  ===============================================================  ==============

The others are ordinary; feature maps are [B, C, H, W], in channels-last memory where it matters.
"""

from models.layers.basic import DropPath, GELU2d, GlobalResponseNorm, LayerNorm2d, LayerScale, SqueezeExcite
from models.layers.contmix import ContMix
from models.layers.depthwise import DepthwiseConv2d, DilatedReparamBlock, ResidualDepthwiseConv2d
from models.layers.involution import Involution2d
from models.layers.outlook import OutlookAttention
from models.layers.pointwise import PointwiseConv2d

__all__ = [
    "ContMix",
    "DepthwiseConv2d",
    "DilatedReparamBlock",
    "DropPath",
    "GELU2d",
    "GlobalResponseNorm",
    "Involution2d",
    "LayerNorm2d",
    "LayerScale",
    "OutlookAttention",
    "PointwiseConv2d",
    "ResidualDepthwiseConv2d",
    "SqueezeExcite",
]
