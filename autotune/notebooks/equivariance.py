"""Notebook 00: what convolution and involution keep fixed, and what each operator's kernel is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from autotune import plots
from autotune.notebooks.recording import Call, contmix_kernels, involution_kernels, recorded_calls
from autotune.notebooks.session import Session, finish, grid, without_ticks

__all__ = ["Invariance", "check_invariance", "invariance_figure", "kernel_sources", "patch_tokens", "sources_figure"]

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Invariance:
    """A layer's output, and where it changes when the layer and a change of the picture trade places.

    ``shift`` and ``swap`` are |f(changed x) − changed f(x)| over the RMS of f(x), [H, W], the mean over channels.
    """

    output: Tensor
    shift: Tensor
    swap: Tensor


def check_invariance(layer: Layer, wide: Tensor, *, offset: int, margin: int) -> Invariance:
    """Does the layer commute with moving the picture, and with swapping its channels?

    Args:
        layer: [1, C, S, S] -> [1, C, S, S].
        wide: a picture [1, C, S + offset, S + offset], from which two views of S × S are cut, ``offset`` pixels apart.
        offset: how far the picture moves, along both axes.
        margin: pixels at the views' edges that are left out, where the layer sees beyond the view.
    """
    side = wide.shape[-1] - offset
    view, moved = wide[..., :side, :side], wide[..., offset:, offset:]
    out, out_moved, out_swapped = layer(view), layer(moved), layer(view.flip(1)).flip(1)
    scale = out.square().mean().sqrt()
    kept = slice(offset + margin, side - margin)
    shifted = slice(margin, side - margin - offset)
    shift = (out[..., kept, kept] - out_moved[..., shifted, shifted]).abs().mean((0, 1)) / scale
    swap = (out - out_swapped).abs().mean((0, 1)) / scale
    return Invariance(out[0], shift, swap)


def invariance_figure(layers: Mapping[str, Layer], wide: Tensor, session: Session, *, offset: int = 32) -> Figure:
    """A row for each layer: its output, then the two differences of ``check_invariance``."""
    with plots.style():
        figure, axes = grid(len(layers), 3, 9.2, 2.9 * len(layers) + 1)
        image: Any = None
        for row, (name, layer) in zip(axes, layers.items(), strict=True):
            found = check_invariance(layer, wide, offset=offset, margin=4)
            without_ticks(row[0]).imshow(_displayable(found.output))
            row[0].set_ylabel(name, fontsize=12, fontweight="bold")
            for axis, difference, change in (
                (row[1], found.shift, f"picture moved {offset} px"),
                (row[2], found.swap, "red and blue swapped"),
            ):
                image = without_ticks(axis).imshow(difference, cmap="cividis", vmin=0, vmax=2)
                same = difference.max() < 1e-4
                result = "the same output" if same else f"differs by {difference.mean():.2f}"
                axis.set_title(f"{change}:\n{result}", fontsize=11)
        axes[0][0].set_title("output f(x)\n", fontsize=11)
        figure.colorbar(image, ax=axes[:, 1:], label="|f(changed x) − changed f(x)| / RMS of f(x)", shrink=0.8)
        return finish(figure, "Convolution ignores place, involution ignores channel", session.label)


def _displayable(output: Tensor) -> np.ndarray:
    """[3, H, W] as colours: grey is 0, two deviations reach black and white."""
    return (0.5 + output / (4 * output.std())).clamp(0, 1).permute(1, 2, 0).numpy()


def patch_tokens(image: Tensor, channels: int, patch: int = 8, seed: int = 0) -> Tensor:
    """A random linear map of every patch × patch block: [1, 3, H, W] -> [1, channels, H / patch, W / patch]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, 3, patch, patch, generator=generator) / (3 * patch**2) ** 0.5
    return torch.nn.functional.conv2d(image, weight, stride=patch)


def kernel_sources(tokens: Tensor, position: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """How much the weights that are applied at ``position`` depend on every token: operator -> [H, W], at most 1.

    For each layer, the norm of the gradient of a random sum of those weights, by PyTorch's own differentiation through
    the layer as the models build it. Norms are relative to the largest; all zero where the weights are constants.

    Args:
        tokens: [1, C, H, W], C a multiple of 32.
        position: (row, column) of the output.
        seed: of the layers' random weights and of the sum.
    """
    from models.layers import ContMix
    from models.rednet import Involution2d
    from models.volo import OutlookAttention

    torch.manual_seed(seed)
    channels, height, width = tokens.shape[1:]
    row, column = position

    def attention(x: Tensor) -> Tensor:
        # Half the usual deviation: a softmax of larger logits would leave most tokens out.
        query, key = (0.5 * torch.randn(channels, channels) / channels**0.5 for _ in range(2))
        return ((query @ x[0, :, row, column]) @ (key @ x[0].flatten(1)) / channels**0.5).softmax(0)

    def recorded(module: nn.Module, *inputs: Tensor) -> Call:
        # Initial weights are small and some are zero; larger ones only set the scale, and none may vanish.
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        with recorded_calls() as calls:
            module.eval()(*inputs)
        (call,) = calls
        return call

    x = tokens.detach().requires_grad_()
    involution = recorded(Involution2d(channels, 7), x)
    outlook = recorded(OutlookAttention(channels, 4), x.permute(0, 2, 3, 1))
    contmix = recorded(ContMix(channels, channels // 4, 13, 4), x, torch.cat((x, x[:, : channels // 4]), 1))
    weights = {
        "involution": involution_kernels(involution)[0, ..., row, column],
        "outlook attention": outlook.arguments["logits"][0, row // 2, column // 2].softmax(-1),
        "ContMix": contmix_kernels(contmix)[1][0, :, row, column],
        "self-attention": attention(x),
    }
    found = {"convolution": torch.zeros(height, width)}
    for name, weight in weights.items():
        (gradient,) = torch.autograd.grad(weight, x, torch.randn_like(weight), retain_graph=True)
        norm = gradient[0].norm(dim=0)
        found[name] = norm / norm.max()
    return found


def sources_figure(
    pixels: np.ndarray, sources: Mapping[str, Tensor], position: tuple[int, int], session: Session
) -> Figure:
    """The tokens on which each operator's weights at ``position`` depend, drawn over the picture."""
    height, width = next(iter(sources.values())).shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    with plots.style():
        figure, axes = grid(1, len(sources), 13, 3.4)
        image: Any = None
        for axis, (name, source) in zip(axes[0], sources.items(), strict=True):
            without_ticks(axis).imshow(pixels.mean(-1), cmap="gray", extent=extent, alpha=0.55)
            shown = np.ma.masked_equal(source.numpy(), 0)  # fainter than the scale takes its lowest colour
            image = axis.imshow(shown, cmap="plasma", norm=LogNorm(1e-3, 1, clip=True), alpha=0.85)
            for colour, width_pt in (("black", 4.5), ("white", 2)):
                axis.plot(position[1], position[0], "s", color=colour, mfc="none", markersize=17, mew=width_pt)
            count = int((source > 0).sum())
            tokens = "no token: constant" if count == 0 else f"{count} of {height * width} tokens"
            axis.set_title(f"{name}\n", fontsize=12)
            axis.text(0.5, 1.02, tokens, transform=axis.transAxes, ha="center", fontsize=11)
        figure.colorbar(image, ax=axes, label="influence on the kernel,\nrelative to the largest", shrink=0.75)
        return finish(figure, "What the kernel at the marked token is made from", f"random weights · {session.label}")
