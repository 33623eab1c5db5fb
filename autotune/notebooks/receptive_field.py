"""Notebook 00: effective receptive fields, how much every pixel moves the feature at the picture's centre."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from autotune import plots, workloads
from autotune.notebooks.session import Model, Session, finish, grid, without_ticks

__all__ = ["centre_of", "effective_receptive_field", "figure", "photographs", "side_of_share"]


def photographs(count: int, size: int, seed: int = 0) -> Tensor:
    """Views of the photograph, randomly cut and mirrored: [count, 3, size, size], ImageNet-normalised."""
    photo = workloads.photograph()
    generator = torch.Generator().manual_seed(seed)
    views = []
    for _ in range(count):
        scale, down, right, mirrored = torch.rand(4, generator=generator).tolist()
        side = round((0.4 + 0.6 * scale) * min(photo.size))
        left, top = round(right * (photo.width - side)), round(down * (photo.height - side))
        view = photo.crop((left, top, left + side, top + side))
        tensor = workloads.image_batch(view, (size, size), 1, torch.float32, torch.device("cpu"))
        views.append(tensor.flip(-1) if mirrored > 0.5 else tensor)
    return torch.cat(views)


def effective_receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """E[ |∂ (Σ_c features[c, centre]) / ∂ pixel| ], normalised to a sum of 1: [H, W].

    Features are the model's last map; the gradient's magnitude is summed over colours and averaged over images
    (arXiv 1701.04128). A map with an even side has no centre: its four central entries stand for it.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        (features,) = model.forward_intermediates(images, indices=1, intermediates_only=True)  # pyright: ignore
        rows, columns = (slice((n - 1) // 2, n // 2 + 1) for n in features.shape[-2:])
        centre = features[..., rows, columns].float().mean((-2, -1)).sum()
        (gradient,) = torch.autograd.grad(centre, images)
    field = gradient.float().abs().sum(1).mean(0)
    return (field / field.sum()).cpu()


def centre_of(field: Tensor) -> tuple[int, int]:
    """Row and column that halve the field: strided convolutions look a little up and left of an entry's own place."""
    row, column = (int((field.sum(axis).cumsum(0) >= 0.5 * field.sum()).nonzero()[0]) for axis in (1, 0))
    return row, column


def side_of_share(field: Tensor, share: float) -> int:
    """Side, always odd, of the smallest square around ``centre_of(field)`` that holds ``share`` of the field.

    A square that reaches beyond the picture finds nothing there.
    """
    row, column = centre_of(field)
    for reach in range(max(field.shape)):
        rows, columns = (slice(max(0, c - reach), c + reach + 1) for c in (row, column))
        if field[rows, columns].sum() >= share * field.sum() * (1 - 1e-6):
            return 2 * reach + 1
    raise ValueError(f"share must lie in 0..1, got {share}")


def figure(fields: Sequence[tuple[Model, Tensor]], session: Session, images: int) -> Figure:
    """A heat map for each model, with the squares that hold half and nine tenths of it."""
    with plots.style():
        drawn, axes = grid(1, len(fields), 4.1 * len(fields), 4.6)
        for axis, (model, field) in zip(axes[0], fields, strict=True):
            side = field.shape[-1]
            row, column = centre_of(field)
            # Blocks of 4 × 4 pixels: single ones only show the stem's stride.
            coarse = torch.nn.functional.avg_pool2d(field[None, None], 4)[0, 0]
            image = without_ticks(axis).imshow(
                coarse / coarse.max(), cmap="inferno", norm=LogNorm(1e-3, 1), extent=(0, side, side, 0)
            )
            for share, line in ((0.5, "-"), (0.9, "--")):
                square = side_of_share(field, share)
                left, top = column + 0.5 - square / 2, row + 0.5 - square / 2
                axis.add_patch(Rectangle((left, top), square, square, fill=False, edgecolor="white", linestyle=line))
                text = axis.text(column, top + 3, f"{share:.0%}: {square}²", color="white", ha="center", va="top")
                text.set_path_effects([withStroke(linewidth=3, foreground="black")])
            axis.set_xlim(0, side)
            axis.set_ylim(side, 0)
            axis.set_title(f"{model.name}\n{model.weights}", fontsize=12)
        drawn.colorbar(image, ax=axes, label="gradient, relative to the largest", shrink=0.8)
        size = fields[0][1].shape[-1]
        return finish(
            drawn,
            "Effective receptive field of the last feature map's centre",
            f"{size}×{size} px, mean of {images} views; squares hold 50 % and 90 % · {session.device_name}, float32",
        )
