"""Train a model on a folder of images, from official weights, from a file, or from scratch.

  python -m models finetune flowers --model overlock_t --pretrained --output run
  torchrun --nproc-per-node 8 -m models finetune imagenet --model volo_d1 --epochs 300 --lr 1e-3 --output run

DIR holds train and val, each with one folder for every class. The run keeps in --output: state.pt (to continue),
log.jsonl, settings.json, classes.txt, last.safetensors and best.safetensors, the weights for evaluate and classify.
Call the same command again after a kill and it continues, with the result it would have had.

AdamW; linear warm-up, then half a cosine; random-resized crops and flips; label smoothing; the averaged weights (EMA)
are the ones evaluated and kept. OverLoCK trains with its auxiliary loss; VOLO on its summed logits, or, with
--model-kwargs return_dense=True, on class and token logits with mix-token.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from models.commands import distributed
from models.commands.arguments import add_device_arguments, add_image_arguments, add_model_arguments, build_model
from models.commands.errors import CommandError, input_errors
from models.commands.files import write_json
from models.commands.folders import EvaluationImages, ImageFolder, TrainingImages
from models.commands.images import Augmentation, Preprocessing, UnreadableImageError
from models.commands.progress import console
from models.commands.recipe import Recipe
from models.commands.training import BEST, STATE, Run, Trainer
from models.commands.types import FRACTION, Number, natural, positive

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Recipe()
    parser.add_argument("dir", type=Path, metavar="DIR", help="holds train and val; or one folder for each class")
    parser.add_argument("--val", type=Path, metavar="DIR", help="images to evaluate on (DIR/val)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the run is kept")
    parser.add_argument("--restart", action="store_true", help="begin anew even if --output holds a run")
    add_model_arguments(parser)

    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=positive, default=default.epochs, metavar="N", help="(%(default)s)")
    group.add_argument("--lr", type=float, default=default.learning_rate, metavar="RATE", help="peak (%(default)s)")
    group.add_argument(
        "--min-lr", type=float, default=default.final_learning_rate, metavar="RATE", help="last step's (%(default)s)"
    )
    group.add_argument("--warmup-epochs", type=float, metavar="N", help="linear warm-up (a tenth of the epochs)")
    for option, name, text in (
        ("--weight-decay", "weight_decay", "for matrices and kernels"),
        ("--layer-decay", "layer_decay", "factor of the learning rate from each layer to the one before"),
        ("--label-smoothing", "label_smoothing", "share of the label that all classes get"),
        ("--aux-weight", "auxiliary_weight", "of OverLoCK's auxiliary loss"),
        ("--clip", "clip_norm", "largest norm of the gradient, 0: any"),
        ("--ema", "ema_decay", "decay of the averaged weights, 0: none"),
    ):
        group.add_argument(
            option, type=float, default=getattr(default, name), dest=name, metavar="X", help=f"{text} (%(default)s)"
        )
    group.add_argument(
        "--drop-path", type=Number(at_least=0, below=1), metavar="RATE", help="stochastic depth (the model's own)"
    )
    group.add_argument(
        "--least-area",
        type=Number(above=0, at_most=1),
        default=0.08,
        metavar="SHARE",
        help="smallest crop (%(default)s)",
    )
    group.add_argument("--flip", type=FRACTION, default=0.5, metavar="P", help="chance of mirroring (%(default)s)")
    group.add_argument("--freeze-backbone", action="store_true", help="train nothing but the classifier")
    group.add_argument("--seed", type=natural, default=default.seed, metavar="N", help="(%(default)s)")

    add_image_arguments(parser)
    add_device_arguments(parser)
    group = parser.add_argument_group("bookkeeping")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument(
        "--save-every", type=natural, default=500, metavar="N", help="steps between states (%(default)s; 0: epochs)"
    )
    group.add_argument("--log-every", type=positive, default=50, metavar="N", help="steps a row (%(default)s)")


def read_folders(arguments: argparse.Namespace) -> tuple[ImageFolder, ImageFolder | None]:
    """The images to train on and those to evaluate on.

    Raises:
        ValueError: a folder is missing or empty, or the two do not have the same classes.
    """
    root, val = arguments.dir, arguments.val
    if (root / "train").is_dir():
        root, val = root / "train", val or (root / "val" if (root / "val").is_dir() else None)
    training = ImageFolder(root)
    validation = None if val is None else ImageFolder(val)
    if validation is not None and validation.classes != training.classes:
        unlike = sorted(set(validation.classes) ^ set(training.classes))
        raise ValueError(
            f"--val: {val} and {root} must have the same class folders; only one has {', '.join(unlike[:5])}"
        )
    return training, validation


def run(arguments: argparse.Namespace) -> int:
    with input_errors():
        same_names = ("weight_decay", "layer_decay", "label_smoothing", "auxiliary_weight", "clip_norm", "ema_decay")
        recipe = Recipe(
            epochs=arguments.epochs,
            batch=arguments.batch,
            learning_rate=arguments.lr,
            final_learning_rate=arguments.min_lr,
            warmup_epochs=arguments.warmup_epochs,
            dtype=arguments.dtype,
            seed=arguments.seed,
            freeze_backbone=arguments.freeze_backbone,
            **{name: getattr(arguments, name) for name in same_names},
        )
        training, validation = read_folders(arguments)
        if arguments.output.exists() and not arguments.output.is_dir():
            raise CommandError(f"--output must be a folder, {arguments.output} is a file")
        if arguments.drop_path is not None:
            arguments.model_kwargs = [*arguments.model_kwargs, ("drop_path_rate", arguments.drop_path)]
    with distributed.process_group(arguments.device) as device:
        with input_errors():
            trainer = make_trainer(arguments, recipe, training, validation, device)
            resumed = not arguments.restart and trainer.resume()
            if distributed.rank() == 0:
                prepare_output(arguments.output, trainer, training.classes, resumed)
        if distributed.rank() == 0:
            _tell(trainer, arguments, training, validation, resumed)
        try:
            trainer.fit()
        except (UnreadableImageError, FloatingPointError) as error:
            raise CommandError(str(error)) from error
        if distributed.rank() == 0:
            scores = [row for row in trainer.log if "top1" in row]
            if scores:
                print(f"top-1 {scores[-1]['top1']:.3f} %   best {scores[-1]['best_top1']:.3f} %")
            print(arguments.output / BEST)
    return 0


def make_trainer(
    arguments: argparse.Namespace,
    recipe: Recipe,
    training: ImageFolder,
    validation: ImageFolder | None,
    device: torch.device,
) -> Trainer:
    """Nothing is written yet. ValueError, TypeError or OSError for what cannot be used."""
    torch.manual_seed(recipe.seed)  # for the classifier, or all of the model, where no file gives it
    model = build_model(arguments, num_classes=len(training.classes), training=True)
    preprocessing = Preprocessing.of(model, arguments.size, arguments.crop_pct, arguments.interpolation)
    augmentation = Augmentation(preprocessing, arguments.least_area, arguments.flip)
    if arguments.grad_checkpointing:
        model.set_grad_checkpointing()
    settings = {
        "model": arguments.model,
        "options": dict(arguments.model_kwargs),
        "weights": arguments.checkpoint or ("official" if arguments.pretrained else "random"),
        **asdict(recipe),
        **asdict(preprocessing),
        "least_area": augmentation.least_area,
        "flip": augmentation.flip,
        "grad_checkpointing": arguments.grad_checkpointing,
        "processes": distributed.world_size(),
        "training_images": training.digest(),
        "validation_images": None if validation is None else validation.digest(),
    }
    evaluated = None
    if validation is not None:
        evaluated = EvaluationImages(validation.samples, preprocessing, preprocessing.channels)
    return Trainer(
        model.to(device),
        recipe,
        TrainingImages(training.samples, augmentation, recipe.seed),
        evaluated,
        device,
        Run(arguments.output, settings, arguments.save_every, arguments.log_every, arguments.workers),
    )


def prepare_output(output: Path, trainer: Trainer, classes: list[str], resumed: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if not resumed:
        (output / STATE).unlink(missing_ok=True)  # first: the files below no longer belong to it
    write_json(output / "settings.json", trainer.run.settings)
    (output / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def _tell(
    trainer: Trainer,
    arguments: argparse.Namespace,
    training: ImageFolder,
    validation: ImageFolder | None,
    resumed: bool,
) -> None:
    weights = "RANDOM" if trainer.run.settings["weights"] == "random" else trainer.run.settings["weights"]
    evaluated = "none to evaluate on" if validation is None else f"{len(validation.samples)} to evaluate on"
    console.print(
        f"{arguments.model} from {weights} weights, {len(training.classes)} classes, {len(training.samples)} images, "
        f"{evaluated}, {trainer.total_steps} steps on {distributed.world_size()} × {trainer.device}",
        markup=False,
    )
    if trainer.step == trainer.total_steps:
        console.print("already finished; --restart begins anew")
    elif resumed:
        console.print(f"continues after step {trainer.step} of {trainer.total_steps}")
