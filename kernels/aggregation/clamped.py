"""The algebra for clamped windows, whose kernels are neighbourhood attention's."""

from torch import Tensor

from kernels.layout import empty_kernel_layout, empty_like_layout
from kernels.neighborhood import launchers
from kernels.neighborhood.configs import Weights
from kernels.windows import Pair, Window


def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]; [B,G,C,H,W] in the memory order of x."""
    if x.numel() == 0:
        return empty_like_layout(x, x.shape)
    return launchers.mix(x, Weights(weight), window)


def transpose(weight: Tensor, g: Tensor, _input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]; [B,G,C,H,W] in the memory order of g."""
    if g.numel() == 0:
        return empty_like_layout(g, g.shape)
    return launchers.transpose(g, Weights(weight), window)


def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H,W] in the memory order of g."""
    out = empty_kernel_layout(g, window.kernel_size)
    return out if g.numel() == 0 else launchers.correlate(g, x, out, window)
