"""Notebook 00: parameters and multiply-adds of the operators' layers, by closed formula and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autotune import figures, plots
from autotune.notebooks.session import Session, Table, finish, grid

__all__ = ["LAYERS", "Layer", "claims_table", "count", "layers_figure", "layers_table", "model_claims_table"]

KERNEL_SIZE = 7  # of convolution and involution, as in RedNet
OUTLOOK_SIZE, OUTLOOK_STRIDE = 3, 2  # as in VOLO
CONTMIX_SIZES, CONTEXT = (5, 13), 49  # as in OverLoCK at 1/16


def _heads(channels: int) -> int:
    """32 channels per head, as in VOLO; ContMix takes as many groups."""
    return channels // 32


@dataclass(frozen=True)
class Layer:
    """A layer C → C on a side × side map with N = side² positions.

    ``parameters`` and ``multiply_adds`` are the closed formulas of (C) and (C, N); ``terms`` is the latter in words,
    leading terms only.
    """

    name: str
    build: Callable[[int], nn.Module]
    parameters: Callable[[int], int]
    multiply_adds: Callable[[int, int], int]
    terms: str


def _convolution(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, bias=False)


def _depthwise(channels: int) -> nn.Module:
    from models.layers import DepthwiseConv2d

    return DepthwiseConv2d(channels, KERNEL_SIZE, bias=False)


def _involution(channels: int) -> nn.Module:
    from models.rednet import Involution2d

    return Involution2d(channels, KERNEL_SIZE)


class _OnMaps(nn.Module):
    """A layer of tokens, [B, H, W, C] or [B, N, C], on a map [B, C, H, W]."""

    def __init__(self, layer: nn.Module, flat: bool) -> None:
        super().__init__()
        self.layer, self.flat = layer, flat

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        return self.layer(tokens.flatten(1, 2) if self.flat else tokens)


def _outlook(channels: int) -> nn.Module:
    from models.volo import OutlookAttention

    return _OnMaps(OutlookAttention(channels, _heads(channels), OUTLOOK_SIZE, OUTLOOK_STRIDE), flat=False)


def _attention(channels: int) -> nn.Module:
    from models.volo import Attention

    return _OnMaps(Attention(channels, _heads(channels)), flat=True)


class _ContMix(nn.Module):
    """ContMix whose context is a quarter of its own features' channels."""

    def __init__(self, channels: int) -> None:
        from models.layers import ContMix

        super().__init__()
        self.layer = ContMix(channels, channels // 4, CONTMIX_SIZES[1], _heads(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.cat((x, x[:, : x.shape[1] // 4]), 1))


MARKERS = ("s", "D", "^", "v", "P", "o")
K2, P4 = KERNEL_SIZE**2, OUTLOOK_SIZE**4
POSITIONS = sum(size**2 for size in CONTMIX_SIZES)

LAYERS = (
    Layer("convolution", _convolution, lambda c: c * c * K2, lambda c, n: n * c * c * K2, "N·C²·K²"),
    Layer("depthwise convolution", _depthwise, lambda c: c * K2, lambda c, n: n * c * K2, "N·C·K²"),
    Layer(
        "self-attention",
        _attention,
        lambda c: 4 * c * c + c,
        lambda c, n: n * 4 * c * c + 2 * n * n * c,
        "4·N·C² + 2·N²·C",
    ),
    Layer(
        "involution",
        _involution,
        # 1×1 to C/4, its batch norm, 1×1 with bias to K² weights for each of C/16 groups.
        lambda c: c * c // 4 + 2 * c // 4 + (c // 4 + 1) * K2 * (c // 16),
        lambda c, n: n * (c * c // 4 + (c // 4) * K2 * (c // 16) + K2 * c),
        "N·C²/4 + N·C·K²·G/4 + N·C·K²",
    ),
    Layer(
        "outlook attention",
        _outlook,
        lambda c: c * c + (c + 1) * _heads(c) * P4 + c * c + c,
        lambda c, n: n * 2 * c * c + n // OUTLOOK_STRIDE**2 * (c * _heads(c) * P4 + P4 * c),
        "2·N·C² + N/4·(C·h·K⁴ + C·K⁴)",
    ),
    Layer(
        "ContMix",
        _ContMix,
        # Query and key to C/2 with batch norms, the 1×1 from 49 affinities, two tables of position biases.
        lambda c: (
            c * c // 2
            + c
            + c * c // 8
            + c
            + (CONTEXT + 1) * POSITIONS
            + _heads(c) * sum((2 * size - 1) ** 2 for size in CONTMIX_SIZES)
        ),
        # Queries; keys, projected once; logits and mixing, half of the channels for each.
        lambda c, n: n * c * c // 2 + CONTEXT * (c * c // 8 + c // 2 * POSITIONS) + 2 * n * (c // 2) * POSITIONS,
        "N·C²/2 + N·C·(5² + 13²)",
    ),
)


def count(layer: Layer, channels: int, side: int) -> tuple[int, int]:
    """Parameters and multiply-adds of one image as PyTorch counts them, on the meta device: nothing is computed."""
    with torch.device("meta"):
        module = layer.build(channels).eval()
        x = torch.empty(1, channels, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2


def _number(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def layers_table(channels: int, side: int) -> Table:
    """Formula and count side by side; they must agree to the last digit."""
    rows = []
    for layer in LAYERS:
        parameters, multiply_adds = count(layer, channels, side)
        agree = (parameters, multiply_adds) == (layer.parameters(channels), layer.multiply_adds(channels, side**2))
        verdict = "equal" if agree else "differ"
        rows.append((layer.name, _number(parameters), _number(multiply_adds), layer.terms, verdict))
    caption = (
        f"C = {channels} channels, N = {side}×{side} positions; K = {KERNEL_SIZE}, of outlook attention {OUTLOOK_SIZE};"
        " G = C/16 groups, h = C/32 heads. Bias, batch norm and position tables are in the counts."
    )
    headings = ("layer", "parameters", "multiply-adds", "leading terms", "count against formula")
    return Table(headings, rows, caption)


def layers_figure(channels: int, sides: Sequence[int], session: Session) -> Figure:
    """Multiply-adds over the map's side (lines: formula, markers: counted), and parameters."""
    colours = ("#555555", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#0072B2")
    with plots.style():
        figure, axes = grid(1, 2, 12, 4.6, width_ratios=(3, 2))
        curve, size = axes[0]
        for layer, colour, marker in zip(LAYERS, colours, MARKERS, strict=True):
            dense = [sides[0] * (sides[-1] / sides[0]) ** (i / 60) for i in range(61)]
            curve.plot(dense, [layer.multiply_adds(channels, round(s * s)) for s in dense], color=colour)
            counted = [count(layer, channels, side)[1] for side in sides]
            curve.plot(sides, counted, marker, color=colour, markersize=7, label=layer.name)
        curve.set(xscale="log", yscale="log", xlabel="side of the map, positions", ylabel="multiply-adds for one image")
        curve.set_xticks(sides, [str(side) for side in sides])
        curve.xaxis.set_minor_formatter(NullFormatter())
        curve.grid(which="major")
        curve.set_title(f"Work, C = {channels}: lines formula, markers counted")
        names = [layer.name for layer in LAYERS]
        parameters = [count(layer, channels, sides[0])[0] for layer in LAYERS]
        for position, (value, colour, marker) in enumerate(zip(parameters, colours, MARKERS, strict=True)):
            size.plot(value, position, marker, color=colour, markersize=9)
            size.annotate(
                _number(value), (value, position), (9, 0), textcoords="offset points", va="center", fontsize=10
            )
        size.set_yticks(range(len(names)), names)
        size.set_ylim(len(names) - 0.5, -0.5)
        size.set(xscale="log", xlabel="parameters", xlim=(min(parameters) / 2, max(parameters) * 6))
        size.set_title(f"Size, C = {channels}")
        size.grid(axis="x")
        size.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        curve.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        curve.legend(loc="upper left", fontsize=10)
        return finish(
            figure, "What a layer costs", f"counted on the meta device, nothing is run · {session.device_name}"
        )


def claims_table() -> Table:
    """What the papers say of their operators, next to the numbers here."""
    channels, side, heads = 384, 28, 6
    positions = side**2

    def self_attention() -> int:
        return positions * 4 * channels**2 + 2 * positions**2 * channels

    def outlook_paper() -> int:
        return positions * channels * (2 * channels + heads * P4) + positions * OUTLOOK_SIZE**2 * channels

    from models.volo import OutlookAttention

    dense = Layer(
        "", lambda c: _OnMaps(OutlookAttention(c, heads, OUTLOOK_SIZE, 1), False), lambda c: 0, lambda c, n: 0, ""
    )
    strided = Layer("", lambda c: _OnMaps(OutlookAttention(c, heads), False), lambda c: 0, lambda c, n: 0, "")
    share = outlook_paper() / self_attention()
    rednet, resnet = figures.count_model("rednet50")["multiply_adds_g"], 4.1
    rows = [
        (
            "involution (2103.06255, abstract)",
            "RedNet-50 computes 66 % of ResNet-50",
            f"{rednet:.2f} G counted / {resnet} G published = {rednet / resnet:.0%}",
        ),
        (
            "outlook attention (2106.13112)",
            f"N·K⁴ < 2C at C = {channels}, K = 3, N = {heads} heads: cheaper than self-attention",
            f"{heads * P4} < {2 * channels}; by its formula {share:.0%} of self-attention's work at {side}²",
        ),
        (
            "the same, counted",
            "HWC(2C + NK⁴) + HWK²C with a window at every token",
            f"{_number(outlook_paper())} by formula, {_number(count(dense, channels, side)[1])} counted "
            f"(mixing takes K⁴, not K²); {_number(count(strided, channels, side)[1])} with VOLO's stride of 2",
        ),
    ]
    return Table(("source", "claim", "here"), rows)


def model_claims_table(names: Sequence[str]) -> Table:
    """Parameters and multiply-adds of whole models at 224², published and counted."""
    rows = []
    for name in names:
        parameters, operations = figures.PUBLISHED[name]
        counted = figures.count_model(name)
        rows.append(
            (
                f"`{name}`",
                f"{parameters:g}",
                f"{counted['parameters_m']:.2f}",
                "–" if operations is None else f"{operations:g}",
                f"{counted['multiply_adds_g']:.2f}",
            )
        )
    headings = ("model at 224²", "parameters, M: published", "counted", "multiply-adds, G: published", "counted")
    return Table(headings, rows)
