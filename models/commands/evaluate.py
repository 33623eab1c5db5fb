"""Measure top-1 and top-5 on a folder of labelled images, with the crop and interpolation of the papers.

  python -m models evaluate imagenet/val --model overlock_t --pretrained --inference
  python -m models evaluate flowers/val --run run --output result.json

DIR holds one folder for each class, numbered in the order of their names: ImageNet's folders are named by synset
(n01440764, n01443537, …), which gives the published numbers. With --resume FILE a run that was killed continues from
its last count in FILE, and ends with the same result.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from kernels.files import write_json
from models.commands import arguments as common
from models.commands.dispatch import CommandError, input_errors
from models.commands.files import plain
from models.commands.folders import UNREADABLE, EvaluationImages, ImageFolder, loader
from models.commands.progress import Bar, console, note
from models.commands.types import DTYPES, positive
from models.inference import optimize_for_inference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="one folder of images for each class")
    common.add_model_arguments(parser)
    parser.add_argument("--inference", action="store_true", help="fold the model first (optimize_for_inference)")
    common.add_image_arguments(parser)
    common.add_device_arguments(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--output", type=Path, metavar="FILE", help="write the result here, as JSON")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--skip-unreadable", action="store_true", help="leave damaged images out and list them")
    group.add_argument("--resume", type=Path, metavar="FILE", help="keep the count here, and continue from it")
    text = "batches between writes of that count (%(default)s)"
    group.add_argument("--save-every", type=positive, default=20, metavar="N", help=text)


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_count(path: Path | None, settings: dict[str, Any], total: int) -> dict[str, Any]:
    """The count so far of ``total`` images, read from ``path`` if that exists.

    Raises:
        ValueError: the file is no such count, or one with other settings; the message names what differs.
    """
    count = {"settings": settings, "position": 0, "top1": 0, "top5": 0, "skipped": [], "seconds": 0.0}
    if path is None or not path.exists():
        return count
    if not path.is_file():  # a pipe would be waited for, a device would never end
        raise ValueError(f"--resume must be a regular file, and {path} is not")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        count = {name: written[name] for name in count}
        differing = [name for name in settings if count["settings"].get(name) != settings[name]]
        images = count["position"] - len(count["skipped"])
        possible = 0 <= count["top1"] <= count["top5"] <= images <= count["position"] <= total and count["seconds"] > 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--resume: {path} is not a count that evaluate wrote") from error
    if differing:
        raise ValueError(f"--resume: {path} counts with other {', '.join(differing)}; delete it, or name another file")
    if not possible:
        raise ValueError(f"--resume: {path} holds numbers that no count of {total} images has; delete it")
    return count


def check_classes(folder: ImageFolder, count: int, model: str) -> None:
    """ValueError unless the folder has as many classes as the model."""
    if len(folder.classes) != count:
        found = f"{folder.root} holds {len(folder.classes)} class folders"
        raise ValueError(f"DIR: {found}, but {model} has {count} classes")


def run(arguments: argparse.Namespace) -> int:
    with input_errors():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process would count all images and write the same files
            raise CommandError("evaluate runs in one process; torchrun is for finetune")
        if arguments.checkpoint is None and not arguments.pretrained:
            raise CommandError("--pretrained, --checkpoint or --run is needed: random weights have no accuracy")
        common.check_parent(arguments.output, "--output")
        common.check_parent(arguments.resume, "--resume")
        folder = ImageFolder(arguments.dir)
        common.complete(arguments)
        if arguments.pretrained:
            check_classes(folder, 1000, arguments.model)  # before anything is downloaded
        model, preprocessing = common.build_model(arguments)
        model.eval()
        check_classes(folder, model.num_classes, arguments.model)
        unlike = set(model.default_cfg.get("label_names", folder.classes)) ^ set(folder.classes)
        if unlike:
            text = ", ".join(sorted(unlike)[:5])
            note(f"the class names of the weights and of DIR differ; only one of them has {text}")
        settings = {
            "model": arguments.model,
            "weights": weights_digest(model),
            "inference": arguments.inference,
            "images": folder.digest(),
            **plain(asdict(preprocessing)),
            "dtype": arguments.dtype,
            "batch": arguments.batch,
        }
        count = read_count(arguments.resume, settings, len(folder.samples))
    model = (optimize_for_inference(model) if arguments.inference else model).to(arguments.device)
    count_images(model, EvaluationImages(folder.samples, preprocessing, arguments.skip_unreadable), count, arguments)
    images, seconds = count["position"] - len(count["skipped"]), count["seconds"]
    if images == 0:
        raise CommandError(f"DIR: no image in {folder.root} can be read")
    result = {
        "checkpoint": arguments.weights,
        **{name: settings[name] for name in ("model", "size", "crop_pct", "interpolation", "dtype")},
        **{name: 100 * count[name] / images for name in ("top1", "top5")},
        "images": images,
        "skipped": count["skipped"],
        "seconds": seconds,
        "images_per_second": images / seconds,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"top-1 {result['top1']:.3f} %   top-5 {result['top5']:.3f} %")
        speed = f"{images / seconds:.1f} images/s with loading"
        print(f"{arguments.model} on {images} images, {preprocessing}, {arguments.dtype}: {speed}")
    for path in result["skipped"]:
        console.print(f"left out, since it cannot be read: {path}", markup=False)
    sys.stdout.flush()  # before the file, whose disk may be full
    if arguments.output is not None:
        write_json(arguments.output, result)
    return 0


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """[2]: how many rows of [B, classes] rank their label first, and how many among the first five or fewer classes."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((hits[:, 0].sum(), hits.sum()))


@torch.no_grad()
def predict(
    model: nn.Module, batches: DataLoader[Any], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of each batch in float32, and its labels. ``model`` is on ``device`` and in evaluation mode."""
    for images, labels in batches:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        yield logits.float(), labels


def count_images(model: nn.Module, images: EvaluationImages, count: dict[str, Any], arguments: Any) -> None:
    """Continues ``count`` to the end of the images; with --resume it is also kept on disk.

    Raises:
        UnreadableImageError: a file that cannot be decoded, and --skip-unreadable was not given.
    """
    place = next(model.parameters()).device
    rest = Subset(images, range(count["position"], len(images)))
    batches = loader(rest, place, arguments.workers, batch_size=arguments.batch)
    started, earlier = time.perf_counter(), count["seconds"]
    with Bar(len(images), count["position"]) as bar:
        if count["position"]:
            bar.say(f"continues after {count['position']} of {len(images)} images")
        for number, (logits, labels) in enumerate(predict(model, batches, place, DTYPES[arguments.dtype]), 1):
            top1, top5 = count_correct(logits, labels).tolist()
            skipped = (labels == UNREADABLE).nonzero().flatten().tolist()
            count["skipped"] += [images.samples[count["position"] + index][0] for index in skipped]
            count["top1"] += top1
            count["top5"] += top5
            count["position"] += len(labels)
            count["seconds"] = earlier + time.perf_counter() - started
            due = number % arguments.save_every == 0 or count["position"] == len(images)
            if due and arguments.resume is not None:
                write_json(arguments.resume, count)
            read = count["position"] - len(count["skipped"])
            bar.advance(len(labels), f"top-1 {100 * count['top1'] / max(1, read):.2f} %")
