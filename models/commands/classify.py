"""Name what photographs show: the five most probable classes of each, printed and drawn.

  python -m models classify cat.jpg dog.jpg --model overlock_t --pretrained
  python -m models classify cat.jpg --run run

Without --pretrained, --checkpoint or --run the weights are random, and so are the answers; the command says so.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kernels.files import atomic_write
from models.commands import arguments as common
from models.commands.dispatch import CommandError, input_errors
from models.commands.images import check_image, read_image
from models.commands.progress import console

GUESSES = 5
SIDE = 800  # pixels of a photograph in the picture, at most
MOST_DRAWN = 100
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
RANDOM = "RANDOM WEIGHTS: without --pretrained, --checkpoint or --run, these answers are meaningless"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a photograph")
    common.add_model_arguments(parser)
    common.add_image_arguments(parser)
    parser.add_argument(
        "--classes", metavar="FILE", help="one class name per line (default: the weights', or ImageNet's)"
    )
    common.add_device_argument(parser)
    picture = Path("classification.png")
    parser.add_argument("--output", type=Path, default=picture, metavar="FILE", help="the picture (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the guesses as JSON")


def check_picture(path: Path) -> None:
    """ValueError unless a picture can be written to ``path``, in the format of its ending."""
    common.check_parent(path, "--output")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output must end in {', '.join(SUFFIXES)}, got {path.name!r}")


def imagenet_classes() -> list[str]:
    """A short, unique name for each class of ImageNet-1k, in the published order."""
    return resources.files("models").joinpath("data/imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


def class_names(count: int, file: str | None, known: Sequence[str] | None) -> list[str]:
    """Names for ``count`` classes: the lines of ``file``, else ``known``, else ImageNet's for 1000, else numbers.

    Raises:
        ValueError: the file cannot be read, or has another number of lines.
    """
    if file is None and known is not None and len(known) == count:
        return list(known)
    if file is None:
        return imagenet_classes() if count == 1000 else [str(label) for label in range(count)]
    try:
        names = Path(file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()  # as file names may be
    except OSError as error:
        raise ValueError(f"--classes must be a file that can be read, {file} cannot: {error.strerror}") from error
    if len(names) != count:
        raise ValueError(f"--classes must have a line for each of the model's {count} classes, {file} has {len(names)}")
    return names


def draw(photographs: list[Image.Image], rows: list[dict[str, Any]], title: str, path: Path, warn: bool) -> None:
    """Draws each photograph beside the bars of its guesses."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def shown(name: str) -> str:
        return name.encode(errors="surrogateescape").decode(errors="replace")

    with matplotlib.rc_context({"text.usetex": False, "text.parse_math": False}):  # names are not TeX
        figure = Figure(figsize=(9, 2.8 * len(photographs) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(photographs), 2, squeeze=False, width_ratios=(1, 1.6))
        for (left, right), photograph, row in zip(axes, photographs, rows, strict=False):
            left.imshow(photograph)
            left.set_axis_off()
            names = [shown(guess["name"]) for guess in row["guesses"]]
            shares = [100 * guess["probability"] for guess in row["guesses"]]
            bars = right.barh(range(len(names)), shares, color="tab:red" if warn else "tab:blue")
            right.bar_label(bars, fmt="%.1f %%", padding=3)
            right.set_yticks(range(len(names)), names)
            right.invert_yaxis()
            right.set(xlim=(0, 115), xlabel="probability, %")
            right.set_title(shown(Path(row["image"]).name), loc="left", fontsize="medium")
            right.spines[["top", "right"]].set_visible(False)
        figure.suptitle(shown(title), color="tab:red" if warn else None)
        atomic_write(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=110))


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    with input_errors():
        check_picture(arguments.output)
        for path in arguments.images:
            check_image(path)
        common.complete(arguments)
        model, preprocessing = common.build_model(arguments)
        model.eval()
        if model.num_classes == 0:
            raise CommandError("--model-kwargs num_classes=0 leaves no class to choose")
        names = class_names(model.num_classes, arguments.classes, model.default_cfg.get("label_names"))
        inputs, photographs = [], []
        for path in arguments.images:
            image = read_image(path)
            inputs.append(preprocessing(image if preprocessing.channels == 3 else image.convert("L")))
            image.thumbnail((SIDE, SIDE))
            photographs += [image] if len(photographs) < MOST_DRAWN else []
    weights = arguments.weights
    if weights == "random":
        console.print(f"[bold white on red] {RANDOM} [/]")
    model.to(arguments.device)
    rows = []
    for path, x in zip(arguments.images, inputs, strict=True):
        best = model(x[None].to(arguments.device))[0].float().softmax(0).topk(min(GUESSES, len(names)))
        guesses = [
            {"class": label, "name": names[label], "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        rows.append({"image": path, "guesses": guesses})
    if arguments.json:
        report = {"model": arguments.model, "weights": weights, "picture": str(arguments.output), "images": rows}
        print(json.dumps(report, indent=1))
    else:
        for row in rows:
            print(row["image"])
            for guess in row["guesses"]:
                print(f"  {100 * guess['probability']:5.1f} %  {guess['name']}")
    sys.stdout.flush()  # before the picture, whose disk may be full
    title = RANDOM if weights == "random" else f"{arguments.model}, {weights} weights"
    draw(photographs, rows, title, arguments.output, warn=weights == "random")
    left_out = len(rows) - len(photographs)
    text = f", without the last {left_out} images" if left_out else ""
    console.print(f"picture: {arguments.output}{text}", markup=False)
    return 0
