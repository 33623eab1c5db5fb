"""Name what photographs show: the five most probable classes of each, and a picture of them.

  python -m models classify cat.jpg dog.jpg --model overlock_t --pretrained
  python -m models classify cat.jpg --model volo_d1 --checkpoint run/best.safetensors --classes run/classes.txt

Without --pretrained or --checkpoint the weights are random and so are the answers; that is said.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from rich.markup import escape

from models.commands.arguments import add_image_arguments, add_model_arguments, build_model, console, device
from models.commands.errors import CommandError, input_errors
from models.commands.files import check_parent
from models.commands.images import Preprocessing, read_image
from models.commands.labels import class_names

__all__ = ["add_arguments", "run"]

GUESSES = 5
RANDOM = "RANDOM WEIGHTS: neither --pretrained nor --checkpoint was given, these answers mean nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a photograph")
    add_model_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument("--classes", metavar="FILE", help="a class name a line (default: ImageNet's, else numbers)")
    parser.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is)")
    parser.add_argument(
        "--output", type=Path, default=Path("classification.png"), metavar="PNG", help="the picture (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the guesses as JSON")


def draw(photographs: list[Image.Image], rows: list[dict[str, Any]], title: str, path: Path, warn: bool) -> None:
    """Each photograph beside the bars of its guesses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1, 1.6))
    for (left, right), photograph, row in zip(axes, photographs, rows, strict=True):
        left.imshow(photograph)
        left.set_axis_off()
        names = [guess["name"] for guess in row["guesses"]]
        shares = [100 * guess["probability"] for guess in row["guesses"]]
        bars = right.barh(range(len(names)), shares, color="tab:red" if warn else "tab:blue")
        right.bar_label(bars, fmt="%.1f %%", padding=3)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set_xlim(0, 115)
        right.set_xlabel("probability, %")
        right.set_title(Path(row["image"]).name, loc="left", fontsize="medium")
        right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color="tab:red" if warn else None)
    figure.savefig(path, dpi=110, format="png")


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    with input_errors():
        check_parent(arguments.output, "--output")
        photographs = [ImageOps.exif_transpose(read_image(path)) for path in arguments.images]
        model = build_model(arguments).eval()
        if model.num_classes == 0:
            raise CommandError("--model-kwargs num_classes=0 leaves nothing to classify with")
        names = class_names(model.num_classes, arguments.classes)
        preprocessing = Preprocessing.of(model, arguments.size, arguments.crop_pct, arguments.interpolation)
    weights = "official" if arguments.pretrained else arguments.checkpoint or "random"
    if weights == "random":
        console.print(f"[bold white on red] {RANDOM} [/]")
    place = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(place)
    rows = []
    for path, photograph in zip(arguments.images, photographs, strict=True):
        image = photograph if preprocessing.channels == 3 else photograph.convert("L")
        logits = model(preprocessing(image)[None].to(place))[0]
        best = logits.float().softmax(0).topk(min(GUESSES, len(names)))
        guesses = [
            {"class": label, "name": names[label], "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        rows.append({"image": path, "guesses": guesses})
    title = RANDOM if weights == "random" else f"{arguments.model}, {weights} weights"
    draw(photographs, rows, title, arguments.output, warn=weights == "random")
    if arguments.json:
        report = {"model": arguments.model, "weights": weights, "picture": str(arguments.output), "images": rows}
        print(json.dumps(report, indent=1))
        return 0
    for row in rows:
        print(row["image"])
        for guess in row["guesses"]:
            print(f"  {100 * guess['probability']:5.1f} %  {guess['name']}")
    console.print(f"picture: {escape(str(arguments.output))}")
    return 0
