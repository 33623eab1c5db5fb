"""Command-line arguments that several commands take, and the model that they describe."""

from __future__ import annotations

import argparse
import ast
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from models._contract import BackboneContract
from models.checkpoints import load_checkpoint, read_state_dict
from models.commands.progress import console
from models.commands.types import DTYPES, Number, device, image_size, positive, processes
from models.downloads import fetch
from models.registry import create_model
from models.volo import VOLO

__all__ = ["add_device_arguments", "add_image_arguments", "add_model_arguments", "build_model"]


def model_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python writes it; what is no Python value is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help='one of those that "list" shows')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="weights: .pth, .pth.tar or .safetensors, or a URL")
    weights.add_argument("--pretrained", action="store_true", help="the official ImageNet weights, downloaded once")
    parser.add_argument(
        "--model-kwargs",
        type=model_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what else the model's function takes, as in drop_path_rate=0.2",
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the model sees (default: as its official weights were tested)")
    group.add_argument("--size", type=image_size, metavar="SIDE", help="pixels, or HEIGHTxWIDTH")
    group.add_argument(
        "--crop-pct",
        type=Number(at_least=0.01, at_most=2),
        metavar="SHARE",
        help="of the image's shorter side that is seen",
    )
    group.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="how images are resized")


def add_device_arguments(parser: argparse.ArgumentParser, loads: bool = False) -> None:
    """``loads``: no more than the device and what loads images; batch and dtype are a recipe's."""
    group = parser.add_argument_group("where and how it runs")
    group.add_argument(
        "--device", type=device, metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU where there is one)"
    )
    if not loads:
        group.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16 and fp16 by autocast (fp32)")
        group.add_argument("--batch", type=positive, default=64, metavar="N", help="images at a time (%(default)s)")
    group.add_argument(
        "--workers",
        type=processes,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="that load images (%(default)s)",
    )


def build_model(
    arguments: argparse.Namespace, num_classes: int | None = None, training: bool = False
) -> BackboneContract:
    """The model that ``add_model_arguments`` describes, its weights loaded.

    ``num_classes`` None: as many as the checkpoint has. For ``training`` a VOLO returns its summed logits, unless
    return_dense is asked for. Warnings, as of a classifier that starts anew, become notes.

    Raises:
        ValueError, TypeError, OSError: a name, an option or a weight file that cannot be used.
    """
    options = dict(arguments.model_kwargs)
    if num_classes is not None and options.setdefault("num_classes", num_classes) != num_classes:
        raise ValueError(f"--model-kwargs: num_classes must be {num_classes} here, got {options['num_classes']}")
    with torch.device("meta"):
        outline = create_model(arguments.model, **options)
    if not isinstance(outline, BackboneContract) or getattr(outline, "features_only", False):
        raise ValueError(f"--model must be a classifier, got {arguments.model} with {options}")
    size = getattr(arguments, "size", None)
    if size is not None and isinstance(outline, VOLO):
        options.setdefault("img_size", size)  # chooses the position embedding, and among the official weights
    if training and isinstance(outline, VOLO):
        options.setdefault("return_dense", False)
    checkpoint = arguments.checkpoint
    if checkpoint is not None:
        if checkpoint.startswith(("http://", "https://")):
            checkpoint = fetch(checkpoint, check=read_state_dict)
        if num_classes is None:
            count = _class_count(read_state_dict(checkpoint), next(iter(outline.classifiers)))
            if count is not None:
                options["num_classes"] = count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = create_model(arguments.model, pretrained=arguments.pretrained, **options)
        if checkpoint is not None:
            load_checkpoint(model, Path(checkpoint))
    for warning in caught:
        console.print(f"[yellow]note:[/] {escape(str(warning.message))}")
    assert isinstance(model, BackboneContract)
    return model


def _class_count(state: Mapping[str, Tensor], classifier: str) -> int | None:
    """Rows of the classifier in a weight file, whatever prefix its names have; None where it has no classifier."""
    entry = f"{classifier}.bias"
    found = (tensor for name, tensor in state.items() if name == entry or name.endswith(f".{entry}"))
    return next((len(tensor) for tensor in found if tensor.ndim == 1), None)
