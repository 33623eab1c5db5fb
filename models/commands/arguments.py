"""Command-line arguments that several commands take, and the model that they describe."""

import argparse
import ast
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from models._contract import BackboneContract
from models.checkpoints import local_file, read_state_dict
from models.commands.files import BEST
from models.commands.images import Preprocessing
from models.commands.progress import note
from models.commands.types import DTYPES, Number, device, image_size, positive, processes
from models.metadata import read_metadata
from models.registry import create_model, entry_point


def model_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where VALUE is read as a Python literal, or else as a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def best_of_run(text: str) -> str:
    """The path of the best weights in the folder of a training run."""
    path = Path(text) / BEST
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"must be a finetune's --output with {BEST} in it, got {text!r}")
    return str(path)


def check_parent(path: Path | None, option: str) -> None:
    """ValueError naming ``option`` unless a file can be put at ``path``, where one is given."""
    if path is not None and path.is_dir():
        raise ValueError(f"{option} must name a file, but {path} is a folder")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")


def make_folder(path: Path, option: str) -> None:
    """ValueError naming ``option`` unless there is a folder at ``path``, or can be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} must be a folder, and {path} cannot be made one: {error.strerror}") from error


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help='one of those that "list" shows (default: the run\'s)')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="weights: a .pth, .pth.tar or .safetensors file, or its URL"
    )
    text = "the best weights of a finetune's --output, with its model, sizes and classes"
    weights.add_argument("--run", type=best_of_run, dest="checkpoint", metavar="DIR", help=text)
    weights.add_argument("--pretrained", action="store_true", help="the official ImageNet weights, downloaded once")
    text = "the last weights of a file that has averaged ones, too (use_ema=False in Python)"
    parser.add_argument("--no-ema", action="store_true", help=text)
    text = "what else the model's function takes, as in drop_path_rate=0.2"
    kwargs: dict[str, Any] = {"type": model_option, "nargs": "+", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("--model-kwargs", help=text, **kwargs)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the model sees (default: as its weights were tested)")
    group.add_argument("--size", type=image_size, metavar="SIDE", help="pixels, or HEIGHTxWIDTH")
    share, text = Number(at_least=0.01, at_most=2), "of the image's shorter side that is seen"
    group.add_argument("--crop-pct", type=share, metavar="SHARE", help=text)
    group.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="how images are resized")


def add_device_argument(parser: Any) -> None:
    best, text = "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 (default: a GPU where there is one)"
    parser.add_argument("--device", type=device, default=best, metavar="NAME", help=text)


def add_device_arguments(parser: argparse.ArgumentParser, loads: bool = False) -> None:
    """With ``loads`` only the device and the loading of images: a recipe holds batch and dtype itself."""
    group = parser.add_argument_group("where and how it runs")
    add_device_argument(group)
    if not loads:
        group.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16 and fp16 by autocast (fp32)")
        group.add_argument("--batch", type=positive, default=64, metavar="N", help="images at a time (%(default)s)")
    most, text = min(4, os.cpu_count() or 1), "processes that load images (%(default)s)"
    group.add_argument("--workers", type=processes, default=most, metavar="N", help=text)


def complete(arguments: argparse.Namespace) -> None:
    """Adds what the weights are called, their ``file`` and ``metadata`` (or None), and the model's name if not given.

    Raises:
        ValueError, OSError: a weight file that cannot be used, or no model is named.
    """
    arguments.weights = "official" if arguments.pretrained else arguments.checkpoint or "random"
    arguments.file = None if arguments.checkpoint is None else local_file(arguments.checkpoint)
    arguments.metadata = None if arguments.file is None else read_metadata(arguments.file)
    if arguments.model is None:
        if arguments.file is None:
            raise ValueError("--model NAME is needed; python -m models list shows the names")
        if arguments.metadata is None:
            raise ValueError("--model NAME is needed: the weights do not say which model they belong to")
        arguments.model = arguments.metadata.model
    entry_point(arguments.model, "--model")


def build_model(
    arguments: argparse.Namespace, num_classes: int | None = None, training: bool = False
) -> tuple[BackboneContract, Preprocessing]:
    """The model that the arguments describe, its weights loaded, and what it sees; options go to ``arguments.options``.

    ``num_classes`` None takes the checkpoint's number. What a checkpoint says of its model replaces options that are
    not given. For ``training`` a VOLO returns its summed logits, unless return_dense is asked for. Warnings, for
    example about a classifier that starts anew, are printed as notes.

    Raises:
        ValueError, TypeError, OSError: a name, an option or a weight file that cannot be used.
    """
    given, said = dict(arguments.model_kwargs), arguments.metadata
    options = ({} if said is None else said.options()) | given
    if num_classes is not None:
        if given.get("num_classes", num_classes) != num_classes:
            raise ValueError(f"--model-kwargs: num_classes must be {num_classes} here, got {given['num_classes']}")
        options["num_classes"] = num_classes
    try:
        with torch.device("meta"):
            outline = create_model(arguments.model, **options)
    except (ValueError, TypeError) as error:  # which names arguments of Python's functions
        raise ValueError(f"--model or --model-kwargs: {error}") from error
    if not isinstance(outline, BackboneContract) or outline.features_only:
        raise ValueError(f"--model must be a classifier, got {arguments.model} with {options}")
    if arguments.size is not None and outline.fixed_input_size and "img_size" not in given:
        options["img_size"] = arguments.size  # chooses the position embedding, and among the official weights
    if training:
        options = outline.plain_options | options
    if arguments.file is not None and num_classes is None and said is None:
        # Rows of the classifier in the file, whatever prefix its names have there.
        entry, state = f"{next(iter(outline.classifiers))}.bias", read_state_dict(arguments.file)
        found = (t for name, t in state.items() if f".{name}".endswith(f".{entry}") and t.ndim == 1)
        if (bias := next(found, None)) is not None:
            options["num_classes"] = len(bias)
    if said is not None:
        note(f"{arguments.checkpoint} was trained as {said}; options given here override that")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model: Any = create_model(
            arguments.model, arguments.pretrained, arguments.file, use_ema=not arguments.no_ema, **options
        )
    for warning in caught:
        note(str(warning.message))
    arguments.options = options
    return model, Preprocessing.of(model, arguments.size, arguments.crop_pct, arguments.interpolation)
